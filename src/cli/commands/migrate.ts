/** `svq migrate`. @module */
import { buildRouteMap } from "@stricli/core";
import { vm } from "./migrate_vm.ts";

/** All of `svq migrate`. */
export const command = buildRouteMap({ routes: { vm }, docs: { brief: "Migrate a guest, live" } });
