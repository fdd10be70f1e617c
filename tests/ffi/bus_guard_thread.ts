// Another thread of the process: which handler does it find or make?
import { busGuardWorks } from "../../src/ffi/mod.ts";
import { busHandler } from "./bus_handler.ts";

busGuardWorks();
(self as unknown as { postMessage(value: number): void }).postMessage(busHandler());
