//! The messages of QMP, from and to lines of JSON. No I/O.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// An error that QEMU gave as the answer to a command.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CommandError {
    /// `GenericError`, `CommandNotFound`, `DeviceNotFound` and the like.
    pub class: String,
    /// QEMU's words; not stable between versions.
    pub desc: String,
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.desc, self.class)
    }
}

/// QEMU's version as its greeting and `query-version` give it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct GreetingVersion {
    /// The three numbers.
    pub qemu: VersionTriple,
    /// What the packager added, often empty.
    #[serde(default)]
    pub package: String,
}

/// A version's numbers, ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VersionTriple {
    /// As in **7**.2.0.
    pub major: u32,
    /// As in 7.**2**.0.
    pub minor: u32,
    /// As in 7.2.**0**.
    pub micro: u32,
}

/// One line from the server.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    /// The first message of a connection.
    Greeting(GreetingVersion),
    /// A command's result; QEMU repeats the id we gave.
    Return { id: Option<String>, value: Value },
    /// A command's failure; without an id where QEMU could not parse the command.
    Error { id: Option<String>, error: CommandError },
    /// Something happened by itself.
    Event { name: String, data: Value, since_unix_epoch: Option<Duration> },
}

/// The command as one line.
pub(super) fn command_line(command: &str, arguments: Value, id: &str) -> Vec<u8> {
    let mut object = Map::new();
    object.insert("execute".to_owned(), command.into());
    if !arguments.is_null() {
        object.insert("arguments".to_owned(), arguments);
    }
    object.insert("id".to_owned(), id.into());
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// What a line says.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn parse(line: &[u8]) -> Result<Message, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let Value::Object(mut object) = value else {
        return Err("it is not a JSON object".to_owned());
    };
    let id = match object.remove("id") {
        Some(Value::String(id)) => Some(id),
        Some(other) => Some(other.to_string()),
        None => None,
    };
    if let Some(greeting) = object.remove("QMP") {
        #[derive(Deserialize)]
        struct Greeting {
            version: GreetingVersion,
        }
        let greeting: Greeting = serde_json::from_value(greeting).map_err(|error| error.to_string())?;
        return Ok(Message::Greeting(greeting.version));
    }
    if let Some(value) = object.remove("return") {
        return Ok(Message::Return { id, value });
    }
    if let Some(error) = object.remove("error") {
        let error = serde_json::from_value(error).map_err(|error| error.to_string())?;
        return Ok(Message::Error { id, error });
    }
    if let Some(name) = object.remove("event") {
        let Value::String(name) = name else { return Err("the event's name is not a string".to_owned()) };
        let since_unix_epoch = object.get("timestamp").and_then(timestamp);
        let data = object.remove("data").unwrap_or(Value::Null);
        return Ok(Message::Event { name, data, since_unix_epoch });
    }
    Err("it has none of `QMP`, `return`, `error` and `event`".to_owned())
}

/// QEMU gives -1 where it could not read the clock.
fn timestamp(value: &Value) -> Option<Duration> {
    let seconds = value.get("seconds")?.as_u64()?;
    let microseconds = value.get("microseconds")?.as_u64().filter(|&us| us < 1_000_000)?;
    Duration::from_secs(seconds).checked_add(Duration::from_micros(microseconds))
}

/// The beginning of what the peer sent, fit for an error message.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    const MAX_EXCERPT_BYTES: usize = 80;
    let cut = &bytes[..bytes.len().min(MAX_EXCERPT_BYTES)];
    cut.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_line_and_leaves_out_no_arguments() {
        assert_eq!(command_line("cont", Value::Null, "7"), b"{\"execute\":\"cont\",\"id\":\"7\"}\n");
    }

    #[test]
    fn events_carry_the_host_time() {
        let line = br#"{"timestamp": {"seconds": 5, "microseconds": 6}, "event": "STOP"}"#;
        let expected = Message::Event {
            name: "STOP".to_owned(),
            data: Value::Null,
            since_unix_epoch: Some(Duration::from_micros(5_000_006)),
        };
        assert_eq!(parse(line), Ok(expected));
        let line = br#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}"#;
        assert!(matches!(parse(line), Ok(Message::Event { since_unix_epoch: None, .. })));
    }

    #[test]
    fn what_is_not_a_message_is_an_error() {
        for line in [&b"{"[..], b"[]", b"{}", b"7", b"\xff", br#"{"event": 7}"#, br#"{"error": 7}"#, br#"{"QMP": 7}"#] {
            assert!(parse(line).is_err(), "{}", excerpt(line));
        }
    }
}
