/**
 * A small model checker: runs two programs that share memory through `Atomics`, in every interleaving of their atomic
 * operations, and reports a state in which nobody can go on although somebody should.
 *
 * The programs are the real code. A program is stopped after an atomic operation by throwing, and resumed by running it
 * again from its beginning: operations it has done before are answered from its log, with shared memory as it was then.
 *
 * @module
 */

/** What a program is given besides its own closure. */
export interface Steps {
  /** An atomic step: notifies the other side. */
  notify(): void;
  /** An atomic step: sleeps until notified. */
  sleep(): void;
  /**
   * No step: says that all private state of the program follows from `text` here. What led to it is forgotten, so that
   * different histories with one result are explored once.
   */
  mark(text: string): void;
}

/** Builds a fresh program over the shared memory; running it to its end means that it has finished. */
export type Program = () => (steps: Steps) => void;

/** What the exploration found. */
export interface Outcome {
  states: number;
  /** Names of the programs that hang in a state in which no step is possible and `mustEnd` has not ended. */
  stuck: string[];
}

interface Entry {
  value: number;
  /** Shared memory directly after the operation. */
  memory: Uint8Array;
}

interface State {
  memory: Uint8Array;
  logs: [readonly Entry[], readonly Entry[]];
  /** Notifications that wait for each program (an eventfd: several count as one). */
  pending: [boolean, boolean];
  ended: [boolean, boolean];
  /** The last mark of each program, and how much of its log came before it. */
  marks: [Mark, Mark];
}

interface Mark {
  text: string;
  at: number;
}

// Not errors: thrown hundreds of thousands of times, a stack trace each would cost most of the time.
class Paused {}
class Blocked {}

/**
 * Explores everything reachable.
 *
 * @param shared the memory of both programs, in its first state
 * @param programs two of them
 * @param mustEnd index of the program that has to reach its end
 */
export function explore(shared: Uint8Array, programs: readonly [Program, Program], mustEnd: 0 | 1): Outcome {
  const real = { load: Atomics.load, store: Atomics.store };
  const seen = new Set<string>();
  const start: Mark = { text: "start", at: 0 };
  const todo: State[] = [
    { memory: shared.slice(), logs: [[], []], pending: [false, false], ended: [false, false], marks: [start, start] },
  ];
  let states = 0;
  const historyOf = ({ logs, marks }: State, who: 0 | 1) =>
    `${marks[who].text}|${logs[who].slice(marks[who].at).map((entry) => entry.value)}`;
  const keyOf = (state: State) =>
    `${String.fromCharCode(...state.memory)}|${historyOf(state, 0)}|${historyOf(state, 1)}|${state.pending}|${state.ended}`;
  /** The state after one step of program `who`; undefined when it sleeps and nobody has notified it. */
  const step = (from: State, who: 0 | 1): State | undefined => {
    const log = from.logs[who];
    const next: State = {
      memory: from.memory,
      logs: [from.logs[0], from.logs[1]],
      pending: [...from.pending],
      ended: [...from.ended],
      marks: [...from.marks],
    };
    let done = 0;
    let result: Entry | undefined;
    const atomic = (operate: () => number): number => {
      if (done < log.length) {
        const entry = log[done++]!;
        shared.set(done === log.length ? from.memory : entry.memory);
        return entry.value;
      }
      if (result !== undefined) throw new Paused();
      const value = operate();
      result = { value, memory: shared.slice() };
      // Stopped here, before whatever follows; that is done first thing in the next step.
      throw new Paused();
    };
    // Before its first operation a program finds the memory of its beginning; what it writes there is its own.
    shared.set(log.length === 0 ? from.memory : first);
    current = atomic;
    try {
      programs[who]()({
        notify: () =>
          void atomic(() => {
            next.pending[1 - who] = true;
            return 0;
          }),
        sleep: () =>
          void atomic(() => {
            if (!from.pending[who]) throw new Blocked();
            next.pending[who] = false;
            return 0;
          }),
        mark: (text) => void (next.marks[who] = { text, at: done }),
      });
      next.ended[who] = true;
    } catch (error) {
      if (error instanceof Blocked) return undefined;
      if (!(error instanceof Paused)) throw error;
      next.logs[who] = [...log, result!];
    }
    next.memory = shared.slice();
    return next;
  };
  const first = shared.slice();
  // Installed once: replacing a built-in discards compiled code.
  let current: (operate: () => number) => number = (operate) => operate();
  Atomics.load = ((array: Uint16Array, index: number) => current(() => real.load(array, index))) as typeof Atomics.load;
  Atomics.store =
    ((array: Uint16Array, index: number, value: number) => current(() => real.store(array, index, value))) as typeof Atomics.store;
  try {
    while (todo.length > 0) {
      const state = todo.pop()!;
      const key = keyOf(state);
      if (seen.has(key)) continue;
      seen.add(key);
      states++;
      const after = ([0, 1] as const).map((who) => state.ended[who] ? undefined : step(state, who));
      if (after.every((next) => next === undefined) && !state.ended[mustEnd]) {
        return { states, stuck: ["driver", "device"].filter((_, who) => !state.ended[who]) };
      }
      for (const next of after) if (next !== undefined) todo.push(next);
    }
  } finally {
    Object.assign(Atomics, real);
    shared.set(first);
  }
  return { states, stuck: [] };
}
