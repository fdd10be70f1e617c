import { selection } from "../../support/lab_vm.ts";
import { labMachines } from "../../support/lab_machines.ts";

selection.only = labMachines("").pair;
