//! The databases of a run and the SQL that writes into their bus tables.

use super::common::{Cluster, ODOO_TABLE, eventually};
use super::ledger::{Key, Row};
use postgres::Error;
use postgres::fallible_iterator::FallibleIterator;
use serde::Deserialize;
use serde_json::{Value, json};

/// Types of messages: what is compared, the markers at the end, and a client's own.
pub const LEDGER: &str = "ledger";
pub const FIRST_MARKER: &str = "first marker";
pub const LAST_MARKER: &str = "last marker";
pub const OWN_MARKER: &str = "own marker";

/// One database.
pub struct Database {
    pub number: u8,
    pub name: String,
    table: &'static str,
    pub sequence: &'static str,
}

/// What a message says: database, channel, transaction, place in it.
#[derive(Deserialize)]
pub struct Body {
    #[serde(rename = "type")]
    pub kind: String,
    pub payload: [u32; 4],
}

impl Database {
    /// Makes the database, every third with Odoo's table.
    pub fn create(cluster: &Cluster, number: u8) -> Database {
        let name = format!("ledger_{number}");
        let is_odoo = number % 3 == 2;
        let (table, sequence) =
            if is_odoo { ("public.bus_bus", "public.bus_bus_id_seq") } else { ("imbus_bus", "imbus_bus_id_seq") };
        let mut client = cluster.database_with(&name, if is_odoo { ODOO_TABLE } else { "" });
        if is_odoo {
            // Until then rows are found, not announced: the order of commits is not promised.
            let text = "SELECT FROM pg_trigger WHERE tgrelid = 'public.bus_bus'::regclass AND tgisinternal";
            eventually("the trigger is attached", || client.query_opt(text, &[]).unwrap().is_some());
        }
        Database { number, name, table, sequence }
    }

    /// A channel as publishers and tokens name it.
    pub fn target(channel: u8) -> Value {
        if channel.is_multiple_of(2) { json!(format!("channel-{channel}")) } else { json!(["res.partner", channel]) }
    }

    /// A channel as the table has it.
    pub fn channel(&self, channel: u8) -> String {
        if channel.is_multiple_of(2) {
            json!([self.name, format!("channel-{channel}")]).to_string()
        } else {
            json!([self.name, "res.partner", channel]).to_string()
        }
    }

    /// A message's payload.
    pub fn message(&self, channel: u8, txn: u32, seq: u32) -> String {
        format!("[{},{channel},{txn},{seq}]", self.number)
    }

    /// One statement a row.
    pub fn send_one(&self, rows: &[(u8, String)]) -> String {
        rows.iter().map(|(channel, payload)| publish(&Database::target(*channel), LEDGER, payload) + ";").collect()
    }

    /// One statement for all rows.
    pub fn send_many(&self, rows: &[(u8, String)]) -> String {
        let words = rows.iter().map(|(channel, payload)| {
            let target = Database::target(*channel);
            format!(r#"[{target},"{LEDGER}",{payload}]"#)
        });
        format!("SELECT bus_sendmany('[{}]'::jsonb)", words.collect::<Vec<_>>().join(","))
    }

    /// The INSERT of Odoo's ORM, for the first rows with ids of one's own.
    pub fn insert(&self, ids: &[i64], rows: &[(u8, String)]) -> String {
        let now = "now() AT TIME ZONE 'UTC'";
        let values = rows.iter().enumerate().map(|(n, (channel, payload))| {
            let id = ids.get(n).map_or("DEFAULT".to_owned(), i64::to_string);
            let channel = self.channel(*channel);
            format!(r#"({id},2,2,'{channel}','{{"type":"{LEDGER}","payload":{payload}}}',{now},{now})"#)
        });
        let columns = "id, create_uid, write_uid, channel, message, create_date, write_date";
        format!("INSERT INTO {} ({columns}) VALUES {}", self.table, values.collect::<Vec<_>>().join(","))
    }

    /// COPY, and its lines.
    pub fn copy(&self, ids: &[i64], rows: &[(u8, String)]) -> (String, String) {
        let lines = rows.iter().enumerate().map(|(n, (channel, payload))| {
            let id = ids.get(n).map_or(String::new(), |id| format!("{id}\t"));
            let channel = self.channel(*channel);
            format!("{id}{channel}\t{{\"type\":\"{LEDGER}\",\"payload\":{payload}}}\tnow\tnow\n")
        });
        let id = if ids.is_empty() { "" } else { "id, " };
        (format!("COPY {} ({id}channel, message, create_date, write_date) FROM STDIN", self.table), lines.collect())
    }

    /// All rows that are compared.
    pub fn rows(&self, cluster: &Cluster) -> Vec<Row> {
        let mut client = cluster.connect(&self.name);
        let text = format!("SELECT id::bigint, message FROM {}", self.table);
        let rows = client.query_raw(&text, Vec::<i32>::new()).unwrap();
        let rows = rows.filter_map(|row| {
            let body: Body = serde_json::from_str(row.get(1)).unwrap();
            let [_, channel, txn, seq] = body.payload;
            let row = Row { key: Key { txn, seq }, channel: channel as u8, id: row.get(0) };
            Ok((body.kind != OWN_MARKER).then_some(row))
        });
        rows.collect().unwrap()
    }
}

/// The statement that publishes on a target.
pub fn publish(target: &Value, kind: &str, payload: &str) -> String {
    match target {
        Value::String(text) => format!("SELECT bus_sendone('{text}'::text, '{kind}', '{payload}')"),
        other => format!("SELECT bus_sendone('{other}'::jsonb, '{kind}', '{payload}')"),
    }
}

/// Whether an error means that the session and the answer are lost: no answer at all, or one of class 57, operator
/// intervention.
pub fn is_lost(error: &Error) -> bool {
    error.code().is_none_or(|code| code.code().starts_with("57"))
}
