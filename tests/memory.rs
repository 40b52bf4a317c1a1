//! What subscriptions cost in memory: 10,000 connections on 100 channels each.

use imbus::core::channel::Channel;
use imbus::core::hub::Hub;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what is allocated, as malloc would hand it out: in steps of 16 bytes with 8 for itself.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);

fn cost(layout: Layout) -> usize {
    (layout.size() + 8).max(24).next_multiple_of(16)
}

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        USED.fetch_add(cost(layout), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(cost(layout), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONNECTIONS: u32 = 10_000;
const CHANNELS: u32 = 100;

/// Bytes per subscription when connection `slot`'s channel `number` is called this.
fn bytes(name: impl Fn(u32, u32) -> String) -> usize {
    let before = USED.load(Ordering::Relaxed);
    let mut hub = Hub::default();
    let mut request = 0;
    for slot in 0..CONNECTIONS {
        hub.open(slot, 5);
        let channels = (0..CHANNELS).map(|number| Channel::from_json(&name(slot, number), "demo").unwrap()).collect();
        let mut next = || {
            request += 1;
            request
        };
        let change = hub.subscribe(slot, channels, 7, &mut next, 0);
        for recovery in change.recoveries {
            hub.recovered(recovery.request, Vec::new(), false, 0);
        }
    }
    let used = USED.load(Ordering::Relaxed) - before;
    assert_eq!(hub.subscribed(0), CHANNELS as usize);
    used / (CONNECTIONS * CHANNELS) as usize
}

#[test]
fn a_million_subscriptions_cost_at_most_100_bytes_each() {
    let alike = bytes(|_, number| format!("\"channel {number}\""));
    let some = bytes(|slot, number| format!(r#"["discuss.channel",{}]"#, (slot * 37 + number * 101) % 50_000));
    let own = bytes(|slot, number| format!(r#"["res.partner",{}]"#, slot * CHANNELS + number));
    println!(
        "bytes per subscription: {alike} on the same channels, {some} on some of 50,000, {own} on channels of their own"
    );
    assert!(alike <= 100 && some <= 100 && own <= 100, "{alike} {some} {own}");
}
