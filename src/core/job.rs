//! The rules of jobs: their states, how often a runner may die in one, which function a target names, and the statement
//! that calls it with JSON arguments. Knows no table and no clock.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Deaths of runners in the same job after which it is given up (SPEC section 8).
pub const DEATHS_MAX: i32 = 5;

/// Where a job stands (column `state`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waits: for a runner, for `run_at`, for a retry or for another job.
    Created,
    Processing,
    /// Ended with a result that waits for its user.
    Succeeded,
    /// Ended, nothing left to see.
    Done,
    Failed,
    /// Ended because somebody wanted it to.
    Cancelled,
}

impl State {
    /// As it stands in the table and in notifications.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Processing => "processing",
            State::Succeeded => "succeeded",
            State::Done => "done",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    /// The state of this name.
    pub fn parse(name: &str) -> Option<State> {
        use State::{Cancelled, Created, Done, Failed, Processing, Succeeded};
        [Created, Processing, Succeeded, Done, Failed, Cancelled].into_iter().find(|state| state.as_str() == name)
    }

    /// Whether something is still to come.
    pub fn is_unfinished(self) -> bool {
        matches!(self, State::Created | State::Processing)
    }

    /// The state a job ends in: a result waits for its user, none leaves nothing to wait for.
    pub fn ended(has_result: bool) -> State {
        if has_result { State::Succeeded } else { State::Done }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Waiting jobs that differ in nothing but their times: each is as good as the next.
#[derive(Clone, Debug, PartialEq)]
pub struct Lane {
    pub queue: String,
    /// For methods of Odoo's; else for functions, or for runners outside.
    pub is_odoo: bool,
    /// OID of the role they run as.
    pub role: u32,
    pub priority: i32,
    /// When the first is to start, in microseconds since 2000.
    pub first: i64,
    /// The same in seconds from now.
    pub due_in: f64,
}

impl Lane {
    /// Whether its first job can start.
    pub fn is_due(&self) -> bool {
        self.due_in <= 0.0
    }

    /// A number that another lane does not have, as good as never, the same in all processes of a server.
    pub fn number(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.queue, self.is_odoo, self.role, self.priority).hash(&mut hasher);
        hasher.finish().max(1)
    }
}

/// The lanes in the order in which their first jobs come: by priority, then by time.
pub fn sort(lanes: &mut [Lane]) {
    lanes.sort_by(|one, other| one.priority.cmp(&other.priority).then(one.due_in.total_cmp(&other.due_in)));
}

/// Seconds until the first lane that is not due yet is; None when there is none.
pub fn next_start(lanes: &[Lane]) -> Option<f64> {
    lanes.iter().map(|lane| lane.due_in).filter(|due_in| *due_in > 0.0).min_by(f64::total_cmp)
}

/// What becomes of a job whose attempt failed.
pub fn after_failure(attempts: i32, max_attempts: i32) -> State {
    if attempts < max_attempts { State::Created } else { State::Failed }
}

/// What becomes of a job whose runner died; `deaths` counts this one too.
pub fn after_death(deaths: i32) -> State {
    if deaths >= DEATHS_MAX { State::Failed } else { State::Created }
}

/// The payload of a failed job's notification and column `payload`: `{"error":{"code","message","data"}}`, as in
/// JSON-RPC. `data` is `{"detail","hint"}` with what PostgreSQL said.
pub fn error_payload(code: &str, message: &str, detail: Option<&str>, hint: Option<&str>) -> String {
    serde_json::json!({
        "error": { "code": code, "message": message, "data": { "detail": detail, "hint": hint } }
    })
    .to_string()
}

/// What a runner outside says of a failed attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// As [`error_payload`].
    pub payload: String,
    /// Its message, and what more there is to read (`data.debug`, a traceback, as Odoo says it).
    pub text: String,
    /// No other attempt can do better (`"retry": false`).
    pub is_final: bool,
}

impl Said {
    /// Reads an object `{"code","message","data","retry"}`, of which only the message is needed, or a string, the message.
    pub fn parse(json: &str) -> Option<Said> {
        let said: serde_json::Value = serde_json::from_str(json).ok()?;
        let (message, object) = match &said {
            serde_json::Value::String(message) => (message.clone(), None),
            serde_json::Value::Object(object) => (object.get("message")?.as_str()?.to_owned(), Some(object)),
            _ => return None,
        };
        let part = |name: &str| object.and_then(|object| object.get(name)).cloned().unwrap_or_default();
        let (code, data) = (part("code"), part("data"));
        let code = if code.is_null() { "failed".into() } else { code };
        let debug = data.get("debug").and_then(serde_json::Value::as_str).unwrap_or_default();
        let text = if debug.is_empty() { message.clone() } else { debug.to_owned() };
        let payload = serde_json::json!({ "error": { "code": code, "message": message, "data": data } }).to_string();
        Some(Said { payload, text, is_final: part("retry") == serde_json::Value::Bool(false) })
    }
}

/// What a function gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    Void,
    Value,
    Set,
}

/// An input parameter of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Empty when it has none.
    pub name: String,
    /// Qualified and quoted SQL name of its type.
    pub type_name: String,
    pub has_default: bool,
}

/// A function that may be meant by a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// `schema.name(types)`, as regprocedure writes it; what is stored with the job.
    pub signature: String,
    /// Qualified and quoted name.
    pub name: String,
    pub parameters: Vec<Parameter>,
    pub returns: Returns,
}

/// Why no function was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// None takes these arguments.
    None,
    /// Several do, equally well.
    Ambiguous(Vec<String>),
}

/// How many defaults a call with `positional` arguments and these names would use; None when it does not fit.
fn fit(candidate: &Candidate, positional: usize, names: &[String]) -> Option<usize> {
    let rest = candidate.parameters.get(positional..)?;
    if !names.iter().all(|name| rest.iter().any(|parameter| parameter.name == *name)) {
        return None;
    }
    let left: Vec<&Parameter> = rest.iter().filter(|parameter| !names.contains(&parameter.name)).collect();
    left.iter().all(|parameter| parameter.has_default).then_some(left.len())
}

/// Chooses among the functions of one schema the one that fits and leaves the fewest parameters to their defaults.
pub fn choose<'a>(candidates: &'a [Candidate], positional: usize, names: &[String]) -> Result<&'a Candidate, Mismatch> {
    let fits: Vec<(usize, &Candidate)> =
        candidates.iter().filter_map(|candidate| Some((fit(candidate, positional, names)?, candidate))).collect();
    let least = fits.iter().map(|(defaults, _)| *defaults).min().ok_or(Mismatch::None)?;
    let best: Vec<&Candidate> =
        fits.into_iter().filter(|(defaults, _)| *defaults == least).map(|(_, candidate)| candidate).collect();
    match best.as_slice() {
        [one] => Ok(one),
        several => Err(Mismatch::Ambiguous(several.iter().map(|candidate| candidate.signature.clone()).collect())),
    }
}

/// The statement that calls the function. Its only parameter is a jsonb object with the arguments under their column
/// names `a0`, `a1`, … ([`argument_object`]), converted to the parameters' types by `jsonb_to_record`. It answers the
/// result as JSON text, or a row of no meaning for a void function.
pub fn call_statement(candidate: &Candidate, positional: usize, names: &[String]) -> String {
    let mut arguments = Vec::new();
    let mut columns = Vec::new();
    for (index, parameter) in candidate.parameters.iter().enumerate() {
        let at = names.iter().position(|name| *name == parameter.name);
        let column = match (index < positional, at) {
            (true, _) => index,
            (false, Some(at)) => positional + at,
            (false, None) => continue,
        };
        columns.push(format!("a{column} {}", parameter.type_name));
        arguments.push(match index < positional {
            true => format!("x.a{column}"),
            false => format!("{} => x.a{column}", quoted(&parameter.name)),
        });
    }
    let call = format!("{}({})", candidate.name, arguments.join(", "));
    let from = match columns.is_empty() {
        true => "(SELECT $1::jsonb) x".to_owned(),
        false => format!("pg_catalog.jsonb_to_record($1::jsonb) AS x({})", columns.join(", ")),
    };
    match candidate.returns {
        Returns::Void => format!("SELECT {call} FROM {from}"),
        Returns::Value => format!("SELECT pg_catalog.to_jsonb({call}) FROM {from}"),
        Returns::Set => {
            format!("SELECT pg_catalog.jsonb_agg(pg_catalog.to_jsonb(r)) FROM {from} CROSS JOIN LATERAL {call} AS r")
        }
    }
}

/// The object that [`call_statement`] takes: positional arguments first, then the named ones, as JSON text.
pub fn argument_object<'a>(arguments: impl Iterator<Item = &'a str>) -> String {
    let members: Vec<String> = arguments.enumerate().map(|(index, json)| format!(r#""a{index}":{json}"#)).collect();
    format!("{{{}}}", members.join(","))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(signature: &str, parameters: &[(&str, &str, bool)], returns: Returns) -> Candidate {
        let parameters = parameters.iter().map(|(name, type_name, has_default)| Parameter {
            name: (*name).into(),
            type_name: (*type_name).into(),
            has_default: *has_default,
        });
        Candidate { signature: signature.into(), name: "public.f".into(), parameters: parameters.collect(), returns }
    }

    #[test]
    fn chooses_by_count_names_and_defaults() {
        let short = function("f(integer)", &[("a", "integer", false)], Returns::Value);
        let long = function("f(integer,text)", &[("a", "integer", false), ("b", "text", true)], Returns::Value);
        let both = [short.clone(), long.clone()];
        assert_eq!(choose(&both, 1, &[]), Ok(&short));
        assert_eq!(choose(&both, 2, &[]), Ok(&long));
        assert_eq!(choose(&both, 1, &["b".into()]), Ok(&long));
        assert_eq!(choose(&both, 0, &["a".into()]), Ok(&short));
        assert_eq!(choose(&both, 0, &[]), Err(Mismatch::None));
        assert_eq!(choose(&both, 1, &["a".into()]), Err(Mismatch::None));
        let other = function("f(text)", &[("a", "text", false)], Returns::Value);
        let clash = [short, other];
        assert!(matches!(choose(&clash, 1, &[]), Err(Mismatch::Ambiguous(names)) if names.len() == 2));
    }

    #[test]
    fn builds_the_call() {
        let f = function("f", &[("a", "integer", false), ("b\"c", "text", true), ("d", "jsonb", true)], Returns::Value);
        assert_eq!(
            call_statement(&f, 1, &["d".into()]),
            "SELECT pg_catalog.to_jsonb(public.f(x.a0, \"d\" => x.a1)) \
             FROM pg_catalog.jsonb_to_record($1::jsonb) AS x(a0 integer, a1 jsonb)"
        );
        assert_eq!(
            call_statement(&f, 1, &["b\"c".into()]),
            "SELECT pg_catalog.to_jsonb(public.f(x.a0, \"b\"\"c\" => x.a1)) \
             FROM pg_catalog.jsonb_to_record($1::jsonb) AS x(a0 integer, a1 text)"
        );
        let nothing = function("f()", &[], Returns::Void);
        assert_eq!(call_statement(&nothing, 0, &[]), "SELECT public.f() FROM (SELECT $1::jsonb) x");
        assert_eq!(argument_object(["1", "\"x\""].into_iter()), r#"{"a0":1,"a1":"x"}"#);
    }

    #[test]
    fn lanes_come_by_priority_and_time() {
        let lane = |queue: &str, priority, due_in| Lane {
            queue: queue.into(),
            is_odoo: false,
            role: 1,
            priority,
            first: 0,
            due_in,
        };
        let mut lanes = [lane("a", 10, -1.0), lane("b", 10, -2.0), lane("c", 5, 3.0), lane("d", 20, 0.5)];
        sort(&mut lanes);
        assert_eq!(lanes.iter().map(|lane| lane.queue.as_str()).collect::<String>(), "cbad");
        assert_eq!(lanes.iter().filter(|lane| lane.is_due()).count(), 2);
        assert_eq!(next_start(&lanes), Some(0.5));
        assert_eq!(next_start(&[]), None);
    }

    #[test]
    fn reads_what_a_runner_says_of_a_failure() {
        let said = Said::parse(r#"{"code":200,"message":"no","data":{"debug":"Traceback"},"retry":false}"#).unwrap();
        assert_eq!((said.text.as_str(), said.is_final), ("Traceback", true));
        assert_eq!(said.payload, r#"{"error":{"code":200,"data":{"debug":"Traceback"},"message":"no"}}"#);
        let short = Said::parse(r#""gone""#).unwrap();
        assert_eq!(short.payload, r#"{"error":{"code":"failed","data":null,"message":"gone"}}"#);
        assert!(!short.is_final);
        for wrong in ["1", "[]", "{}", r#"{"message":1}"#, ""] {
            assert_eq!(Said::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn gives_up_after_the_fifth_death_and_the_last_attempt() {
        assert_eq!(after_death(4), State::Created);
        assert_eq!(after_death(5), State::Failed);
        assert_eq!(after_failure(1, 1), State::Failed);
        assert_eq!(after_failure(1, 3), State::Created);
        assert_eq!(State::parse("failed"), Some(State::Failed));
        assert_eq!(State::parse("Failed"), None);
        assert!(State::Created.is_unfinished() && !State::Cancelled.is_unfinished());
        assert_eq!(State::ended(true), State::Succeeded);
        assert_eq!(State::ended(false), State::Done);
    }
}
