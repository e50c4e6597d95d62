//! What is said on the control socket: lines of JSON. docs/CONTROL.md is their description.

use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use vmferry_core::engine::AtTimeLimit;

use super::Change;

/// The version of what is said. Fields may be added to answers without a new one.
pub const PROTOCOL_VERSION: u32 = 1;
/// The longest request, without the end of its line.
pub(super) const REQUEST_BYTES_MAX: usize = 4096;
/// The longest answer that a client takes.
pub(super) const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// Between two lines of a watch.
pub(super) const INTERVAL_MIN: Duration = Duration::from_millis(100);
pub(super) const INTERVAL_MAX: Duration = Duration::from_secs(60);
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);
/// The longest limit: a year.
const LIMIT_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// What a client wants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// How far is it?
    Show,
    /// The same now, again and again, and at the end.
    Watch {
        /// Between two lines; a second if it is not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interval_ms: Option<u64>,
    },
    /// Change limits.
    Set(SetRequest),
    /// End the migration; the guest goes on at the source.
    Cancel,
    /// Hold the push.
    Pause,
    /// Go on with it.
    Continue,
}

/// Limits to change; what is not given stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// The most bytes to send per second; `null`: as the path allows.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<Option<u64>>,
    /// The longest pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<f64>,
    /// The most time until the pause, counted from the beginning; `null`: without end.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub time_limit_ms: Option<Option<f64>>,
    /// What happens when it is over: `abort` or `switch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_time_limit: Option<String>,
}

/// `null` is a value here, other than nothing.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// What is said to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// [`PROTOCOL_VERSION`] of who says it.
    pub version: u32,
    /// Whether the request was carried out; true for events.
    pub ok: bool,
    /// This is no answer to a request but a line of a watch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<Event>,
    /// How far the migration is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// Why the request was not carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Refusal>,
}

impl Answer {
    pub(super) fn status(status: Status) -> Self {
        Self { version: PROTOCOL_VERSION, ok: true, event: None, status: Some(status), error: None }
    }

    pub(super) fn event(event: Event, status: Status) -> Self {
        Self { event: Some(event), ..Self::status(status) }
    }

    pub(super) fn refusal(error: Refusal) -> Self {
        Self { version: PROTOCOL_VERSION, ok: false, event: None, status: None, error: Some(error) }
    }
}

/// Lines of a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// How far it is.
    Progress,
    /// It has ended; the last line.
    End,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people.
    pub text: String,
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The line is no request as this version knows them, or is too long.
    BadRequest,
    /// A value is out of range.
    BadValue,
    /// The migration is past the point up to which that can be done.
    TooLate,
    /// No migration is under way, though the process waits for one.
    NothingRuns,
    /// This side of a migration does not do that.
    Unsupported,
    /// Too many clients, or too many commands that wait.
    Busy,
    /// One that this version does not know.
    #[serde(other)]
    Other,
}

/// Which side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// From which the guest moves.
    Source,
    /// To which it moves.
    Target,
}

/// How far a migration is. Times in ms, sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The process.
    pub pid: u32,
    /// Which side it is.
    pub role: Role,
    /// Which guest: the path of its QMP socket, or `demo`.
    pub guest: String,
    /// The migration's name, once there is one.
    pub migration_id: Option<String>,
    /// What is going on, for people.
    pub doing: String,
    /// Since the beginning.
    pub elapsed_ms: f64,
    /// The guest's pages; the source knows.
    pub pages: Option<Pages>,
    /// The pass under way, from 1; the source knows.
    pub pass: Option<u32>,
    /// Bytes sent, or received.
    pub wire_bytes: u64,
    /// Measured, or the cap where that is less; the source knows.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// What the user allows; the source knows.
    pub limits: Option<Limits>,
    /// Whether the user holds the push.
    pub is_held: bool,
    /// Expected time until the guest runs on the target; `null` where that cannot be said.
    pub eta_ms: Option<f64>,
    /// Why it has not ended; the source knows.
    pub reason: Option<Reason>,
    /// How it ended: the `outcome` of the report.
    pub outcome: Option<String>,
}

/// The guest's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// All of them.
    pub total: u64,
    /// Pages whose newest content the target does not have.
    pub pending: u64,
    /// Of these, pages held back as the working set.
    pub held: u64,
}

/// What the user allows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// The most bytes per second; `null`: as the path allows.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The longest pause.
    pub downtime_limit_ms: f64,
    /// The most time until the pause; `null`: without end.
    pub time_limit_ms: Option<f64>,
    /// What happens when it is over: `abort` or `switch`.
    pub at_time_limit: String,
}

/// Why a migration has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// For programs.
    pub kind: String,
    /// For people.
    pub text: String,
}

impl Status {
    pub(super) fn new(pid: u32, role: Role, guest: String, doing: String) -> Self {
        Self {
            pid,
            role,
            guest,
            migration_id: None,
            doing,
            elapsed_ms: 0.0,
            pages: None,
            pass: None,
            wire_bytes: 0,
            bandwidth_bytes_per_s: None,
            limits: None,
            is_held: false,
            eta_ms: None,
            reason: None,
            outcome: None,
        }
    }
}

/// A line as a request, or why it is none.
pub(super) fn parse(line: &[u8]) -> Result<Request, Refusal> {
    let bad = |error: serde_json::Error| Refusal::new(RefusalKind::BadRequest, format!("no request: {error}"));
    let mut object: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(line).map_err(bad)?;
    if let Some(version) = object.remove("version")
        && !version.as_u64().is_some_and(|version| (1..=u64::from(PROTOCOL_VERSION)).contains(&version))
    {
        let text = format!("version {version} is not known here, only {PROTOCOL_VERSION}");
        return Err(Refusal::new(RefusalKind::BadRequest, text));
    }
    // Those without any fields of their own would take any.
    let known = match object.get("request").and_then(serde_json::Value::as_str) {
        Some("show" | "cancel" | "pause" | "continue") => object.len() == 1,
        Some("watch") => object.keys().all(|key| key == "request" || key == "interval_ms"),
        _ => true,
    };
    if !known {
        return Err(bad(serde_json::Error::custom("there are fields that this request does not have")));
    }
    serde_json::from_value(object.into()).map_err(bad)
}

/// How often a watch is told.
pub(super) fn interval(interval_ms: Option<u64>) -> Result<Duration, Refusal> {
    let interval = interval_ms.map_or(INTERVAL_DEFAULT, Duration::from_millis);
    if (INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
        return Ok(interval);
    }
    let (least, most) = (INTERVAL_MIN.as_millis(), INTERVAL_MAX.as_millis());
    Err(Refusal::new(RefusalKind::BadValue, format!("interval_ms must be between {least} and {most}")))
}

/// The change that is wanted, or what is wrong with a value.
pub(super) fn change(set: &SetRequest) -> Result<Change, Refusal> {
    let bad = |text: String| Refusal::new(RefusalKind::BadValue, text);
    let time = |name: &str, ms: f64| match Duration::try_from_secs_f64(ms / 1e3) {
        Ok(time) if time <= LIMIT_MAX => Ok(time),
        Ok(_) | Err(_) => Err(bad(format!("{name} must be between 0 and {}", LIMIT_MAX.as_millis()))),
    };
    if set.bandwidth_bytes_per_s == Some(Some(0)) {
        return Err(bad("bandwidth_bytes_per_s must be at least 1, or null; `pause` sends nothing".to_owned()));
    }
    if *set == SetRequest::default() {
        return Err(bad("nothing is to be set".to_owned()));
    }
    let at_time_limit = match set.at_time_limit.as_deref() {
        None => None,
        Some("abort") => Some(AtTimeLimit::Abort),
        Some("switch") => Some(AtTimeLimit::Switch),
        Some(other) => return Err(bad(format!("at_time_limit must be abort or switch, not {other:?}"))),
    };
    let time_limit = match set.time_limit_ms {
        Some(Some(ms)) => Some(Some(time("time_limit_ms", ms)?)),
        Some(None) => Some(None),
        None => None,
    };
    Ok(Change {
        bandwidth_bytes_per_s: set.bandwidth_bytes_per_s,
        downtime_limit: set.downtime_limit_ms.map(|ms| time("downtime_limit_ms", ms)).transpose()?,
        time_limit,
        at_time_limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(line: &str) -> Option<RefusalKind> {
        parse(line.as_bytes()).err().map(|refusal| refusal.kind)
    }

    #[test]
    fn requests_are_what_the_description_says() {
        for (line, request) in [
            (r#"{"request":"show"}"#, Request::Show),
            (r#" {"version":1, "request":"cancel"} "#, Request::Cancel),
            (r#"{"request":"pause"}"#, Request::Pause),
            (r#"{"request":"continue"}"#, Request::Continue),
            (r#"{"request":"watch"}"#, Request::Watch { interval_ms: None }),
            (r#"{"request":"watch","interval_ms":200}"#, Request::Watch { interval_ms: Some(200) }),
            (
                r#"{"request":"set","bandwidth_bytes_per_s":null,"downtime_limit_ms":50.5,"time_limit_ms":null}"#,
                Request::Set(SetRequest {
                    bandwidth_bytes_per_s: Some(None),
                    downtime_limit_ms: Some(50.5),
                    time_limit_ms: Some(None),
                    at_time_limit: None,
                }),
            ),
        ] {
            let parsed = parse(line.as_bytes());
            assert_eq!(parsed.as_ref(), Ok(&request), "{line}");
            let again = serde_json::to_vec(&request).unwrap();
            assert_eq!(parse(&again), parsed, "what our client writes");
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for line in [
            "",
            "show",
            "[]",
            "{}",
            "\u{0}",
            r#"{"request":"fly"}"#,
            r#"{"request":["show"]}"#,
            r#"{"request":"show","now":true}"#,
            r#"{"request":"watch","interval":1}"#,
            r#"{"request":"set","bandwidth":1}"#,
            r#"{"request":"set","bandwidth_bytes_per_s":-1}"#,
            r#"{"request":"set","downtime_limit_ms":"50ms"}"#,
            r#"{"request":"show","version":2}"#,
            r#"{"request":"show","version":"1"}"#,
        ] {
            assert_eq!(kind(line), Some(RefusalKind::BadRequest), "{line}");
        }
        assert_eq!(parse(b"{\"request\":\"\xff\"}").unwrap_err().kind, RefusalKind::BadRequest);
        let deep = "[".repeat(REQUEST_BYTES_MAX);
        assert_eq!(kind(&deep), Some(RefusalKind::BadRequest));
    }

    #[test]
    fn values_have_bounds() {
        let set = SetRequest::default;
        for wrong in [
            set(),
            SetRequest { bandwidth_bytes_per_s: Some(Some(0)), ..set() },
            SetRequest { downtime_limit_ms: Some(-1.0), ..set() },
            SetRequest { downtime_limit_ms: Some(f64::NAN), ..set() },
            SetRequest { time_limit_ms: Some(Some(1e30)), ..set() },
            SetRequest { at_time_limit: Some("later".into()), ..set() },
        ] {
            assert_eq!(change(&wrong).unwrap_err().kind, RefusalKind::BadValue, "{wrong:?}");
        }
        let right = SetRequest {
            bandwidth_bytes_per_s: Some(None),
            time_limit_ms: Some(Some(1500.0)),
            at_time_limit: Some("switch".into()),
            ..set()
        };
        let expected = Change {
            bandwidth_bytes_per_s: Some(None),
            downtime_limit: None,
            time_limit: Some(Some(Duration::from_millis(1500))),
            at_time_limit: Some(AtTimeLimit::Switch),
        };
        assert_eq!(change(&right), Ok(expected));
        assert_eq!(interval(None), Ok(INTERVAL_DEFAULT));
        assert!(interval(Some(99)).is_err() && interval(Some(60_001)).is_err() && interval(Some(100)).is_ok());
    }

    #[test]
    fn answers_of_a_later_version_can_be_read() {
        let line = r#"{"version":2,"ok":false,"error":{"kind":"melted","text":"…","more":1},"news":[]}"#;
        let answer: Answer = serde_json::from_str(line).unwrap();
        assert_eq!(answer.error.unwrap().kind, RefusalKind::Other);
        let status = Status::new(7, Role::Target, "x".into(), "waiting".into());
        let line = serde_json::to_string(&Answer::event(Event::End, status.clone())).unwrap();
        assert_eq!(serde_json::from_str::<Answer>(&line).unwrap(), Answer::event(Event::End, status));
    }
}
