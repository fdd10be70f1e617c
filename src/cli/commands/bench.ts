/** `svq bench`: ring, relay, migrate. @module */
import { buildRouteMap } from "@stricli/core";
import { migrate } from "./bench_migrate.ts";
import { relay } from "./bench_relay.ts";
import { ring } from "./bench_ring.ts";

/** All of `svq bench`. */
export const command = buildRouteMap({
  routes: { ring, relay, migrate },
  docs: { brief: "Measure what relaying and migrating cost on this machine" },
});
