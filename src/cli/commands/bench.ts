/** `svq bench`: ring, migrate. @module */
import { buildRouteMap } from "@stricli/core";
import { migrate } from "./bench_migrate.ts";
import { ring } from "./bench_ring.ts";

/** All of `svq bench`. */
export const command = buildRouteMap({
  routes: { ring, migrate },
  docs: { brief: "Measure what relaying and migrating cost on this machine" },
});
