/** `svq migrate`: run, listen, vm, status, cancel. @module */
import { buildRouteMap } from "@stricli/core";
import { cancel, status } from "./migrate_control.ts";
import { listen } from "./migrate_listen.ts";
import { run } from "./migrate_run.ts";
import { vm } from "./migrate_vm.ts";

/** All of `svq migrate`. */
export const command = buildRouteMap({
  routes: { run, listen, vm, status, cancel },
  docs: { brief: "Migrate a guest to another process or host" },
});
