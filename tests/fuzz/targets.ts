/**
 * All fuzz targets by name.
 *
 * @module
 */
import { CONTROL } from "./control_target.ts";
import { MIGRATION } from "./migration_target.ts";
import { RINGS } from "./ring_target.ts";
import type { FuzzTarget } from "./target.ts";
import { VDUSE_MESSAGES } from "./vduse_target.ts";
import { VHOST_USER, VHOST_USER_RELAY } from "./vhost_user_target.ts";

/** The targets. */
export const TARGETS: Record<string, FuzzTarget> = {
  "vhost-user": VHOST_USER,
  "vhost-user-relay": VHOST_USER_RELAY,
  migration: MIGRATION,
  control: CONTROL,
  vduse: VDUSE_MESSAGES,
  rings: RINGS,
};
