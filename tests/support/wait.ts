/** How long tests wait where nothing else is said: far above what a loaded machine needs, and an emulated one on it. */
export const PATIENCE_MS: number = Deno.env.get("SVQ_IN_LAB") === "1" ? 150_000 : 60_000;

/**
 * Waits until `condition` gives something other than undefined or false, looking every 10 ms, and returns it.
 *
 * @param what ends the message "Waited N ms for ..."
 */
export async function waitUntil<T>(
  what: string,
  condition: () => T | undefined | false | Promise<T | undefined | false>,
  timeoutMs: number = PATIENCE_MS,
): Promise<T> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    const value = await condition();
    if (value !== undefined && value !== false) return value;
    if (performance.now() > deadline) throw new Error(`Waited ${timeoutMs} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
