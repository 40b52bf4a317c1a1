//! The core decides: channels, payload splitting, wire messages, subscriptions, delivery order, job rules, errors.
//! It knows neither PostgreSQL nor sockets, reads no clock (time is an argument) and starts no thread.

pub mod channel;
pub mod ends;
pub mod error;
pub mod granted;
pub mod hub;
pub mod intake;
pub mod job;
pub mod journal;
pub mod json;
pub mod line;
pub mod link;
pub mod notification;
pub mod odoo;
pub mod pace;
pub mod payload;
pub mod position;
pub mod protocol;
pub mod queues;
pub mod replay;
pub mod ring;
pub mod rotation;
pub mod rpc;
pub mod schedule;
pub mod settings;
pub mod span;
pub mod status;
pub mod template;
pub mod token;
pub mod tracker;
pub mod visitors;
pub mod written;
