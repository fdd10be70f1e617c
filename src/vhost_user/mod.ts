/**
 * vhost-user: messages, connections, the front-end and the back-end server.
 *
 * @module
 */
export * from "./message.ts";
export * from "./connection.ts";
export * from "./requester.ts";
export * from "./region_table.ts";
export * from "./front_end.ts";
export * from "./probe.ts";
export * from "./server.ts";
export * from "./server_rules.ts";
export * from "./serve.ts";
