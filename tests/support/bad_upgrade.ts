/**
 * New versions of svq that do not manage to take a relay over: `bad_upgrade.ts HOW relay run …`.
 *
 * @module
 */
import { runCli } from "../../src/cli/app.ts";
import { processSink } from "../../src/cli/output.ts";
import { ReceivedFds } from "../../src/relay/handover.ts";
import { Takeover } from "../../src/relay/takeover.ts";

const [how, ...words] = Deno.args;

const { connect } = Takeover;
const { touched } = Takeover.prototype;
const { take } = ReceivedFds.prototype;
const die = () => {
  Deno.kill(Deno.pid, "SIGKILL");
  return new Promise<never>(() => {});
};

/** What goes wrong. */
const WAYS: Record<string, () => void> = {
  "ends at once": () => Deno.exit(3),
  "does not know the format": () => {
    const { stringify } = JSON;
    JSON.stringify = ((value: unknown) => stringify(value).replace("svq.upgrade/1", "svq.upgrade/0")) as typeof JSON.stringify;
  },
  "dies with the state in its hands": () => {
    Takeover.connect = async (path) => {
      await connect(path);
      return await die();
    };
  },
  "cannot use the state": () => {
    Takeover.connect = async (path) => {
      const takeover = await connect(path);
      const region = takeover.state.relay?.memory[0];
      if (region !== undefined) region.size = 2 ** 40;
      return takeover;
    };
  },
  "dies in front of the first ring": () => Takeover.prototype.touched = die,
  "fails with its rings running": () => {
    Takeover.prototype.touched = async function () {
      await touched.call(this);
      ReceivedFds.prototype.take = () => {
        ReceivedFds.prototype.take = take;
        throw new Error("Out of luck");
      };
    };
  },
  "dies with its rings running": () => {
    Takeover.prototype.running = async () => {
      // Long enough for requests to be in its hands.
      await new Promise((resolve) => setTimeout(resolve, 20));
      return await die();
    };
  },
};

WAYS[how!]!();
Deno.exit(
  await runCli(words, { stdout: processSink(Deno.stdout), stderr: processSink(Deno.stderr), env: (name) => Deno.env.get(name) }),
);
