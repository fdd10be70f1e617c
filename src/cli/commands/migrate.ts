/** `svq migrate`: run, listen, status, cancel. @module */
import { buildRouteMap } from "@stricli/core";
import { cancel, status } from "./migrate_control.ts";
import { listen } from "./migrate_listen.ts";
import { run } from "./migrate_run.ts";

/** All of `svq migrate`. */
export const command = buildRouteMap({
  routes: { run, listen, status, cancel },
  docs: { brief: "Migrate a guest to another process or host" },
});
