// What a user would write without imbus: LISTEN with `pg`, and `ws` to everybody. Prints its port.
import pg from 'pg';
import { WebSocketServer } from 'ws';

const server = new WebSocketServer({ host: '127.0.0.1', port: 0, backlog: 4096 }, () => console.log(server.address().port));
const subscribers = new Set();
server.on('connection', (socket) => {
  socket.on('error', () => {});
  socket.on('message', (text) => {
    if (JSON.parse(text).event_name === 'subscribe') subscribers.add(socket);
  });
  socket.on('close', () => subscribers.delete(socket));
});

const client = new pg.Client({ connectionString: process.argv[2] });
client.on('notification', ({ payload }) => {
  for (const socket of subscribers) socket.send(payload);
});
await client.connect();
await client.query('LISTEN fanout');
