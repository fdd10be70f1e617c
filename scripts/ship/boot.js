// Runs the packed program. Each piece is a function of the loader that returns what the piece exports; it is compiled when
// it is first needed. `text(name)` gives a piece's source, `stage(entry)` the source that starts a thread with that entry.
((text, stage, entry) => {
  if (entry === "main.js") {
    // These were for the runtime's own start, not for the processes that svq starts.
    for (const [name, value] of Object.entries(ENVIRONMENT)) if (Deno.env.get(name) === value) Deno.env.delete(name);
  }
  globalThis[Symbol.for("svq.packaging")] = "packed";
  const pieces = new Map();
  const load = (name) => {
    let exports = pieces.get(name);
    if (exports === undefined) {
      exports = (0, eval)(text(name))(load);
      pieces.set(name, exports);
    }
    return exports;
  };
  load.worker = (name) => new URL(`data:text/javascript,${encodeURIComponent(stage(name))}`);
  load(entry);
});
