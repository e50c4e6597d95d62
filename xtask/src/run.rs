//! Starting other programs, with errors that name the program and what it said.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Lines of a failed program's own messages that an error repeats.
const QUOTED_LINES_MAX: usize = 12;

/// The Cargo that runs this xtask, in the workspace root.
pub(crate) fn cargo(root: &Path) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command.current_dir(root);
    command
}

/// Runs a program to its end and returns what it printed. A failure quotes its last messages.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {program}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let messages = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = messages.lines().collect();
    let quoted = lines[lines.len().saturating_sub(QUOTED_LINES_MAX)..].join("\n  ");
    bail!("{program} failed ({}):\n  {quoted}", output.status)
}

/// Whether a program of this name can be started.
pub(crate) fn is_on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()))
}

/// Runs a program with the terminal's input and output; answers whether it succeeded.
pub(crate) fn passes(command: &mut Command) -> Result<bool> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("cannot start {program}"))?;
    Ok(status.success())
}
