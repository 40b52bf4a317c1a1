//! A notification: one committed row of the bus table.

use super::channel::Channel;
use serde::{Deserialize, Serialize};

/// One committed row of the bus table, as the database worker hands it on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notification {
    /// The row's id in the bus table; what clients know it by.
    pub id: i64,
    /// Its channel, without the database (a notification never leaves its database).
    pub channel: Channel,
    /// The JSON text of column `message`, `{"type":…,"payload":…}`, passed on as it stands. Checked by
    /// [`super::json::check`], so it may be put into a frame.
    pub message: Box<str>,
}
