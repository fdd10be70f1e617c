/**
 * Puts a module in front of svq's use of libc (src/ffi/libc.ts, LIBC_HOOK), in this thread and in every Worker that it starts:
 * the module is imported before the Worker's own.
 *
 * @module
 */

// Static imports in a module of its own: a Worker's first message must find its module ready.
function withHook(hook: string, worker: string): string {
  return `data:text/javascript,${encodeURIComponent(`import ${JSON.stringify(hook)};\nimport ${JSON.stringify(worker)};`)}`;
}

/** Workers that this thread starts from now on import `hook` first. @param hook URL of the module */
export function hookWorkers(hook: string): void {
  const Plain = globalThis.Worker;
  globalThis.Worker = class extends Plain {
    constructor(specifier: string | URL, options?: WorkerOptions) {
      super(withHook(hook, String(specifier)), options);
    }
  };
}
