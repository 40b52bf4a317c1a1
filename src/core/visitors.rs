//! Who is here by a session of Odoo's: which sockets share a session, which sessions are the same user's, when a session
//! is to be checked again, and whose last socket has gone. Time is an argument.

use super::hub::Moment;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// How long a user may have no socket before that counts, in milliseconds: a page that is loaded again closes one and
/// opens another.
pub const GRACE: Moment = 2_000;

/// A user, or a guest, of a database: its OID and who it is.
pub type User = (u32, Arc<str>);

/// The sockets, the sessions and the users; `V` is what is said to Odoo of a session.
pub struct Visitors<V> {
    sockets: HashMap<i64, Socket>,
    sessions: HashMap<Arc<str>, Session<V>>,
    users: HashMap<User, usize>,
    /// When which session is to be checked.
    checks: BTreeSet<(Moment, Arc<str>)>,
    /// Whose last socket went, when that counts, and the session it had.
    leaving: HashMap<User, (Moment, V)>,
}

struct Socket {
    session: Arc<str>,
    user: Option<User>,
}

struct Session<V> {
    visitor: V,
    sockets: HashSet<i64>,
    check: Moment,
}

impl<V> Default for Visitors<V> {
    fn default() -> Self {
        let (sockets, sessions, users) = (HashMap::new(), HashMap::new(), HashMap::new());
        Visitors { sockets, sessions, users, checks: BTreeSet::new(), leaving: HashMap::new() }
    }
}

impl<V: Clone> Visitors<V> {
    /// A socket (by its number) has been let in by a session, or again, as this user. Its session is checked `recheck`
    /// milliseconds from now, 0 for never. True when the user was about to have left.
    pub fn here(
        &mut self,
        id: i64,
        session: &Arc<str>,
        visitor: V,
        user: Option<User>,
        now: Moment,
        recheck: Moment,
    ) -> bool {
        let came_back = user.as_ref().is_some_and(|user| self.leaving.remove(user).is_some());
        if let Some(user) = &user {
            *self.users.entry(user.clone()).or_default() += 1;
        }
        let is_known = user.is_some();
        self.forget(id, now);
        let check = if recheck == 0 || !is_known { Moment::MAX } else { now.saturating_add(recheck) };
        let entry = self.sessions.entry(session.clone()).or_insert_with(|| Session {
            visitor,
            sockets: HashSet::new(),
            check: Moment::MAX,
        });
        entry.sockets.insert(id);
        self.checks.remove(&(entry.check, session.clone()));
        entry.check = check;
        if check != Moment::MAX {
            self.checks.insert((check, session.clone()));
        }
        self.sockets.insert(id, Socket { session: session.clone(), user });
        came_back
    }

    /// A socket has closed.
    pub fn gone(&mut self, id: i64, now: Moment) {
        self.forget(id, now);
    }

    fn forget(&mut self, id: i64, now: Moment) {
        let Some(Socket { session: name, user }) = self.sockets.remove(&id) else { return };
        let Some(session) = self.sessions.get_mut(&name) else { return };
        session.sockets.remove(&id);
        let visitor = session.visitor.clone();
        if session.sockets.is_empty() {
            self.checks.remove(&(session.check, name.clone()));
            self.sessions.remove(&name);
        }
        let Some(user) = user else { return };
        let Some(count) = self.users.get_mut(&user) else { return };
        *count -= 1;
        if *count == 0 {
            self.users.remove(&user);
            self.leaving.insert(user, (now.saturating_add(GRACE), visitor));
        }
    }

    /// Users without a socket for long enough, each with its last session: told once.
    pub fn left(&mut self, now: Moment) -> Vec<(User, V)> {
        let due: Vec<User> =
            self.leaving.iter().filter(|(_, (at, _))| *at <= now).map(|(user, _)| user.clone()).collect();
        due.into_iter().filter_map(|user| self.leaving.remove(&user).map(|(_, visitor)| (user, visitor))).collect()
    }

    /// A session that is to be checked now. It is not due again before [`Visitors::checked`].
    pub fn check(&mut self, now: Moment) -> Option<(Arc<str>, V)> {
        let (at, name) = self.checks.first().filter(|(at, _)| *at <= now)?.clone();
        self.checks.remove(&(at, name.clone()));
        let session = self.sessions.get_mut(&name)?;
        session.check = Moment::MAX;
        Some((name, session.visitor.clone()))
    }

    /// A session was checked, or could not be: it is due again at this time.
    pub fn checked(&mut self, name: &Arc<str>, at: Moment) {
        if let Some(session) = self.sessions.get_mut(name)
            && session.check == Moment::MAX
        {
            session.check = at;
            self.checks.insert((at, name.clone()));
        }
    }

    /// The sockets of a session.
    pub fn sockets(&self, name: &str) -> Vec<i64> {
        self.sessions.get(name).map(|session| session.sockets.iter().copied().collect()).unwrap_or_default()
    }

    /// The users a session's sockets came in as.
    pub fn users(&self, name: &str) -> HashSet<User> {
        let sockets = self.sessions.get(name).into_iter().flat_map(|session| &session.sockets);
        sockets.filter_map(|id| self.sockets.get(id)?.user.clone()).collect()
    }

    /// When to call [`Visitors::check`] next.
    pub fn next_check(&self) -> Option<Moment> {
        self.checks.first().map(|(at, _)| *at)
    }

    /// When to call [`Visitors::left`] next.
    pub fn next_left(&self) -> Option<Moment> {
        self.leaving.values().map(|(at, _)| *at).min()
    }

    /// How many sessions are here.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Moment = 60_000;

    fn user(id: u32) -> Option<User> {
        Some((5, format!("res.partner({id})").into()))
    }

    #[test]
    fn a_user_leaves_with_the_last_socket_of_all_sessions() {
        let mut visitors: Visitors<&str> = Visitors::default();
        let (one, two): (Arc<str>, Arc<str>) = ("one".into(), "two".into());
        visitors.here(1, &one, "v1", user(3), 0, MINUTE);
        visitors.here(2, &one, "v1", user(3), 0, MINUTE);
        visitors.here(3, &two, "v2", user(3), 0, MINUTE);
        visitors.gone(1, 10);
        visitors.gone(2, 10);
        assert_eq!(visitors.next_left(), None);
        visitors.gone(3, 20);
        assert_eq!(visitors.next_left(), Some(20 + GRACE));
        assert!(visitors.left(19 + GRACE).is_empty());
        assert_eq!(visitors.left(20 + GRACE), [(user(3).unwrap(), "v2")]);
        assert!(visitors.left(MINUTE).is_empty());
        assert_eq!(visitors.sessions(), 0);
    }

    #[test]
    fn who_comes_back_in_time_has_not_left() {
        let mut visitors: Visitors<&str> = Visitors::default();
        let one: Arc<str> = "one".into();
        visitors.here(1, &one, "v", user(3), 0, MINUTE);
        visitors.gone(1, 10);
        assert!(visitors.here(2, &one, "v", user(3), 20, MINUTE));
        assert!(visitors.left(MINUTE).is_empty());
        // The same socket again, and again, is one socket.
        assert!(!visitors.here(2, &one, "v", user(3), 30, MINUTE));
        visitors.gone(2, 40);
        assert_eq!(visitors.left(MINUTE).len(), 1);
    }

    #[test]
    fn a_session_is_checked_once_however_many_sockets_it_has() {
        let mut visitors: Visitors<&str> = Visitors::default();
        let one: Arc<str> = "one".into();
        visitors.here(1, &one, "v", user(3), 0, MINUTE);
        visitors.here(2, &one, "v", user(3), 10, MINUTE);
        assert_eq!(visitors.check(MINUTE + 9), None);
        assert_eq!(visitors.check(MINUTE + 10), Some((one.clone(), "v")));
        assert_eq!(visitors.check(MINUTE + 10), None);
        visitors.checked(&one, 2 * MINUTE);
        assert_eq!(visitors.next_check(), Some(2 * MINUTE));
        let mut all = visitors.sockets("one");
        all.sort_unstable();
        assert_eq!(all, [1, 2]);
        assert_eq!(visitors.users("one").len(), 1);
        visitors.gone(1, 0);
        visitors.gone(2, 0);
        assert_eq!(visitors.next_check(), None);
        visitors.checked(&one, 3 * MINUTE);
        assert_eq!(visitors.next_check(), None);
    }

    #[test]
    fn the_public_is_never_checked_nor_missed() {
        let mut visitors: Visitors<&str> = Visitors::default();
        visitors.here(1, &"p".into(), "v", None, 0, MINUTE);
        assert_eq!(visitors.next_check(), None);
        visitors.gone(1, 10);
        assert_eq!(visitors.next_left(), None);
    }
}
