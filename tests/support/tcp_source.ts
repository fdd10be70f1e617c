/** Run by a test in its own network namespace: sends whoever connects so many KiB in so many ms, and prints their SHA-256. */
const [address, port, kib, ms] = Deno.args;
const CHUNK = 16 << 10;
const chunks = Number(kib) * 1024 / CHUNK;
const bytes = new Uint8Array(chunks * CHUNK);
let state = 1;
for (let i = 0; i < bytes.length; i++) {
  state = Math.imul(state, 1664525) + 1013904223 | 0;
  bytes[i] = state >>> 24;
}
const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
console.log(`digest ${[...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`);
using listener = Deno.listen({ hostname: address!, port: Number(port) });
console.log("listening");
using connection = await listener.accept();
console.log("connected");
const start = performance.now();
for (let i = 0; i < chunks; i++) {
  const chunk = bytes.subarray(i * CHUNK, (i + 1) * CHUNK);
  for (let sent = 0; sent < chunk.length;) sent += await connection.write(chunk.subarray(sent));
  const rest = start + Number(ms) * (i + 1) / chunks - performance.now();
  if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
  if (i === chunks >> 2) console.log("quarter");
}
console.log("sent");
