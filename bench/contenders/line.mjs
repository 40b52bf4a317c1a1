// How the driver speaks with a peer in Node: one JSON object a line, each answered by one; `events` come in between.
import { createInterface } from "node:readline";

export const [address, settings] = [process.argv[2], JSON.parse(process.argv[3])];

export function say(message) {
    process.stdout.write(JSON.stringify(message) + "\n");
}

// performance.now() as seconds since the epoch: the tick of Date.now() tells how far they are apart.
let offset = 0;
export function setClock() {
    const before = Date.now();
    while (Date.now() === before);
    offset = Date.now() - performance.now();
}
export const now = () => (performance.now() + offset) / 1000;

// Counts what was handled, keeps when each noted job began, and says once when all that were expected are through.
export const handled = { count: 0, expected: Infinity, began: [] };
export function handle(task, data) {
    if (task === "note") handled.began.push([data.n, now()]);
    if (++handled.count === handled.expected) say({ event: "handled", at: now() });
    if (task === "fail" && data.n % 100 === 0) throw new Error("as every hundredth");
}

export function expect({ jobs }) {
    Object.assign(handled, { count: 0, expected: jobs, began: [] });
    setClock();
}

export async function serve(commands) {
    for await (const line of createInterface({ input: process.stdin })) {
        const message = JSON.parse(line);
        try {
            say({ answer: (await commands[message.do](message)) ?? null });
        } catch (error) {
            say({ error: String(error.stack ?? error) });
        }
        if (message.do === "quit") process.exit(0);
    }
}
