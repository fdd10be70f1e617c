/** How many quick test files one `deno test` process is given: enough that its start does not count. */
const BATCH = 12;

/**
 * Cuts a list of test files into what one process each is given: files that match `alone` by themselves and first, since they
 * take long, then the others in groups.
 *
 * @returns every file once
 */
export function batches(files: readonly string[], alone: RegExp): string[][] {
  const single = files.filter((path) => alone.test(path)).map((path) => [path]);
  const quick = files.filter((path) => !alone.test(path));
  const groups: string[][] = [];
  for (let at = 0; at < quick.length; at += BATCH) groups.push(quick.slice(at, at + BATCH));
  return [...single, ...groups];
}
