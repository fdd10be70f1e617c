import { selection } from "../../support/lab_vm.ts";

selection.only = "vp";
