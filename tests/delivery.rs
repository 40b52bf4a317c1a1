//! What is committed reaches its subscribers, once, whoever wrote it; nothing else does.

mod common;

use common::Cluster;
use serde_json::json;

#[test]
fn a_message_from_sql_reaches_a_subscribed_client() {
    let cluster = Cluster::start();
    let mut sql = cluster.database("demo");
    let mut socket = cluster.subscriber(&mut sql, json!(["broadcast", ["res.partner", 42]]), 0);
    sql.execute("SELECT bus_sendone('broadcast', 'greeting', '{\"text\": \"é😀\"}')", &[]).unwrap();
    let got = socket.next();
    assert_eq!(got["message"], json!({"type": "greeting", "payload": {"text": "é😀"}}));
    let id: i64 = sql.query_one("SELECT max(id) FROM imbus_bus", &[]).unwrap().get(0);
    assert_eq!(got["id"], json!(id));
    sql.execute("SELECT bus_sendone('[\"res.partner\", 42]'::jsonb, 't', '2')", &[]).unwrap();
    assert_eq!(socket.payload(), json!(2));
}
