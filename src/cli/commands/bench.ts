/** `svq bench`: ring. @module */
import { buildRouteMap } from "@stricli/core";
import { ring } from "./bench_ring.ts";

/** All of `svq bench`. */
export const command = buildRouteMap({
  routes: { ring },
  docs: { brief: "Measure what relaying costs on this machine" },
});
