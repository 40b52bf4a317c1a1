//! Who is on a channel, in few bytes: most channels have one connection, some have all of them.

use super::Slot;

/// The connections on one channel: none, one, or a list of [`Lists`].
#[derive(Debug, PartialEq, Eq)]
pub struct Members(u32);

/// Nobody.
const NOBODY: u32 = u32::MAX;

/// Set where the number is that of a list; slots are smaller.
const LIST: u32 = 1 << 31;

/// Room that a list keeps, as a share of what it holds.
const ROOM: usize = 4;

impl Default for Members {
    fn default() -> Members {
        Members(NOBODY)
    }
}

impl Members {
    /// Whether there is nobody.
    pub fn is_empty(&self) -> bool {
        self.0 == NOBODY
    }

    fn list(&self) -> Option<usize> {
        (self.0 != NOBODY && self.0 & LIST != 0).then_some((self.0 & !LIST) as usize)
    }
}

/// The lists of all channels with more than one connection.
#[derive(Default)]
pub struct Lists {
    lists: Vec<Vec<Slot>>,
    free: Vec<u32>,
}

impl Lists {
    /// The connections.
    pub fn slots<'a>(&'a self, members: &'a Members) -> &'a [Slot] {
        match members.list() {
            Some(list) => self.lists.get(list).map(Vec::as_slice).unwrap_or_default(),
            None if members.is_empty() => &[],
            None => std::slice::from_ref(&members.0),
        }
    }

    /// Adds a connection that is not there yet.
    pub fn add(&mut self, members: &mut Members, slot: Slot) {
        if members.is_empty() {
            members.0 = slot & !LIST;
        } else if let Some(list) = members.list() {
            if let Some(list) = self.lists.get_mut(list) {
                list.push(slot);
            }
        } else {
            let list = vec![members.0, slot];
            let at = match self.free.pop() {
                Some(at) => at,
                None => self.lists.len() as u32,
            };
            match self.lists.get_mut(at as usize) {
                Some(place) => *place = list,
                None => self.lists.push(list),
            }
            members.0 = at | LIST;
        }
    }

    /// Takes a connection away, if it is there.
    pub fn remove(&mut self, members: &mut Members, slot: Slot) {
        let Some(at) = members.list() else {
            if members.0 == slot {
                members.0 = NOBODY;
            }
            return;
        };
        let Some(list) = self.lists.get_mut(at) else { return };
        if let Some(place) = list.iter().position(|found| *found == slot) {
            list.swap_remove(place);
        }
        if let [last] = list[..] {
            *list = Vec::new();
            self.free.push(at as u32);
            members.0 = last;
        } else if list.capacity() > ROOM * list.len() {
            list.shrink_to(2 * list.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn members_are_a_set_whatever_their_number(steps in proptest::collection::vec((0u32..3, 0u32..40), 0..400)) {
            let mut lists = Lists::default();
            let mut all: Vec<(Members, BTreeSet<Slot>)> = (0..3).map(|_| Default::default()).collect();
            for (which, slot) in steps {
                let (members, set) = &mut all[which as usize];
                if set.remove(&slot) {
                    lists.remove(members, slot);
                } else {
                    set.insert(slot);
                    lists.add(members, slot);
                }
                for (members, set) in &all {
                    prop_assert_eq!(lists.slots(members).iter().copied().collect::<BTreeSet<_>>(), set.clone());
                    prop_assert_eq!(lists.slots(members).len(), set.len());
                    prop_assert_eq!(members.is_empty(), set.is_empty());
                }
            }
            let used = all.iter().filter(|(_, set)| set.len() > 1).count();
            prop_assert_eq!(lists.lists.len() - lists.free.len(), used);
        }
    }
}
