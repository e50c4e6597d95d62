//! `vmferry ctl`: what runs, and changes to it, over the control sockets of this user's migrations.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use vmferry_host::Cancel;
use vmferry_host::control::{Client, ControlServer, Event, Found, Limits, Request, Role, SetRequest, Status, running};

use crate::cli::{CtlCommand, CtlSetArgs};
use crate::output::{print_bytes, print_json};
use crate::units::{show_bytes, show_ms, show_rate};

/// Between two lines of `show --follow`.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// The fewest characters of a migration's name that choose it.
const PREFIX_MIN: usize = 4;
/// So many characters of a migration's name are in the table.
const SHORT_ID: usize = 8;

/// Serves the control socket of this process, where that can be done; the migration does not depend on it.
pub(crate) fn serve(role: Role, guest: &str, cancel: &Cancel) -> Option<ControlServer> {
    match ControlServer::start(role, guest, cancel) {
        Ok(server) => {
            tracing::debug!(path = %server.path().display(), "control socket");
            Some(server)
        }
        Err(error) => {
            let error = vmferry_host::describe(&error);
            tracing::warn!(error, "there is no control socket, and `vmferry ctl` does not find this migration");
            None
        }
    }
}

pub(crate) fn run(command: &CtlCommand) -> anyhow::Result<ExitCode> {
    match command {
        CtlCommand::List { json } => list(*json)?,
        CtlCommand::Show { id, follow: false, json } => {
            let status = choose(id.as_deref())?.status;
            if *json { print_json(&status)? } else { print_bytes(describe(&status).as_bytes())? }
        }
        CtlCommand::Show { id, follow: true, json } => follow(&choose(id.as_deref())?, *json)?,
        CtlCommand::Set(args) => {
            let request = set_request(args)?;
            let status = ask(args.id.as_deref(), &Request::Set(request))?;
            let limits = status.limits.as_ref().map(describe_limits).unwrap_or_default();
            print_bytes(format!("{}: {limits}\n", name(&status)).as_bytes())?;
        }
        CtlCommand::Cancel { id } => {
            let status = ask(id.as_deref(), &Request::Cancel)?;
            print_bytes(format!("{}: cancelled; the guest goes on at the source\n", name(&status)).as_bytes())?;
        }
        CtlCommand::Pause { id } => {
            let status = ask(id.as_deref(), &Request::Pause)?;
            let text = "no page is sent until `vmferry ctl continue`; the guest runs on";
            print_bytes(format!("{}: {text}\n", name(&status)).as_bytes())?;
        }
        CtlCommand::Continue { id } => {
            let status = ask(id.as_deref(), &Request::Continue)?;
            print_bytes(format!("{}: {}\n", name(&status), status.doing).as_bytes())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(json: bool) -> anyhow::Result<()> {
    let all: Vec<Status> = running()?.into_iter().map(|found| found.status).collect();
    if json {
        return print_json(&all);
    }
    if all.is_empty() {
        return print_bytes(b"no migration runs\n");
    }
    let header = ["PID", "MIGRATION", "SIDE", "GUEST", "TIME", "SENT", "LEFT", "ETA", "DOING"].map(str::to_owned);
    let mut rows = vec![header];
    rows.extend(all.iter().map(|status| {
        [
            status.pid.to_string(),
            status.migration_id.as_deref().map_or("-", |id| &id[..id.len().min(SHORT_ID)]).to_owned(),
            side(status.role).to_owned(),
            status.guest.clone(),
            show_ms(status.elapsed_ms),
            show_bytes(status.wire_bytes),
            left(status).unwrap_or_else(|| "-".to_owned()),
            status.eta_ms.map_or("-".to_owned(), show_ms),
            status.doing.clone(),
        ]
    }));
    print_bytes(table(&rows).as_bytes())
}

/// Columns as wide as their widest cell.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn follow(found: &Found, json: bool) -> anyhow::Result<()> {
    let mut client = Client::connect(&found.path)?;
    client.ask(&Request::Watch { interval_ms: Some(FOLLOW_INTERVAL.as_millis() as u64) })?;
    loop {
        let answer = client.next_event(FOLLOW_INTERVAL)?;
        let Some(status) = answer.status else { continue };
        let line = if json { serde_json::to_string(&status).context("cannot write JSON")? } else { one_line(&status) };
        print_bytes(format!("{line}\n").as_bytes())?;
        if answer.event == Some(Event::End) {
            return Ok(());
        }
    }
}

fn ask(id: Option<&str>, request: &Request) -> anyhow::Result<Status> {
    let found = choose(id)?;
    Ok(Client::connect(&found.path)?.ask(request)?)
}

/// The process that is meant.
fn choose(id: Option<&str>) -> anyhow::Result<Found> {
    let mut all = running()?;
    let Some(id) = id else {
        return match all.len() {
            0 => bail!("no migration runs"),
            1 => Ok(all.remove(0)),
            count => bail!("{count} migrations run: say which one by its PID or MIGRATION\n{}", short_list(&all)),
        };
    };
    // A number is a process if there is such a one; a migration's name can consist of digits too.
    if let Some(index) = all.iter().position(|found| found.status.pid.to_string() == id) {
        return Ok(all.swap_remove(index));
    }
    let is_meant = |found: &Found| {
        let name = found.status.migration_id.as_deref();
        id.len() >= PREFIX_MIN && name.is_some_and(|name| name.starts_with(&id.to_ascii_lowercase()))
    };
    let none = if all.is_empty() { "; none runs".to_owned() } else { format!("; there are\n{}", short_list(&all)) };
    let mut meant: Vec<Found> = all.into_iter().filter(is_meant).collect();
    match meant.len() {
        0 => bail!("no migration is called `{id}` (a PID, or at least {PREFIX_MIN} characters of MIGRATION){none}"),
        1 => Ok(meant.remove(0)),
        count => bail!("`{id}` means {count} processes: give the PID\n{}", short_list(&meant)),
    }
}

fn short_list(all: &[Found]) -> String {
    let lines = all.iter().map(|Found { status, .. }| {
        let id = status.migration_id.as_deref().unwrap_or("-");
        format!("  {}  {id}  {}  {}", status.pid, side(status.role), status.guest)
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn set_request(args: &CtlSetArgs) -> anyhow::Result<SetRequest> {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let request = SetRequest {
        bandwidth_bytes_per_s: args.bandwidth.map(|bandwidth| bandwidth.0),
        downtime_limit_ms: args.downtime_limit.map(ms),
        time_limit_ms: args.time_limit.map(|limit| limit.0.map(ms)),
        at_time_limit: args.at_time_limit.map(|answer| answer.engine().name().to_owned()),
    };
    if request == SetRequest::default() {
        return Err(crate::usage_error("nothing to set: give --bandwidth, --downtime-limit or --time-limit"));
    }
    Ok(request)
}

fn side(role: Role) -> &'static str {
    match role {
        Role::Source => "source",
        Role::Target => "target",
    }
}

fn name(status: &Status) -> String {
    match &status.migration_id {
        Some(id) => format!("{} ({})", status.pid, &id[..id.len().min(SHORT_ID)]),
        None => status.pid.to_string(),
    }
}

fn left(status: &Status) -> Option<String> {
    Some(show_bytes(status.pages?.pending * vmferry_core::pages::PAGE_BYTES))
}

fn describe_limits(limits: &Limits) -> String {
    let bandwidth = limits.bandwidth_bytes_per_s.map_or("no cap".to_owned(), |rate| show_rate(rate as f64));
    let time = match limits.time_limit_ms {
        Some(ms) => format!("{}, then {}", show_ms(ms), limits.at_time_limit),
        None => "none".to_owned(),
    };
    let downtime = show_ms(limits.downtime_limit_ms);
    format!("bandwidth {bandwidth}, downtime limit {downtime}, time limit {time}")
}

fn describe(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| text.push_str(&format!("{name:<12}{value}\n"));
    line("process", format!("{}, {}", status.pid, side(status.role)));
    line("guest", status.guest.clone());
    line("migration", status.migration_id.clone().unwrap_or_else(|| "-".to_owned()));
    line("doing", status.doing.clone());
    if let Some(outcome) = &status.outcome {
        line("outcome", outcome.clone());
    }
    line("time", show_ms(status.elapsed_ms));
    let verb = if status.role == Role::Source { "sent" } else { "received" };
    line(verb, show_bytes(status.wire_bytes));
    if let (Some(pages), Some(left)) = (status.pages, left(status)) {
        let pass = status.pass.map_or(String::new(), |pass| format!("; pass {pass}"));
        line(
            "left",
            format!("{left}, {} of {} pages, {} of them held back{pass}", pages.pending, pages.total, pages.held),
        );
    }
    if let Some(rate) = status.bandwidth_bytes_per_s {
        line("path", show_rate(rate));
    }
    if let Some(limits) = &status.limits {
        line("limits", describe_limits(limits));
        line("ETA", status.eta_ms.map_or("not to be said".to_owned(), show_ms));
    }
    if let Some(reason) = &status.reason {
        line("why", reason.text.clone());
    }
    text
}

fn one_line(status: &Status) -> String {
    let doing = status.outcome.as_ref().unwrap_or(&status.doing);
    let mut text = format!("{}: {doing}, {}", show_ms(status.elapsed_ms), show_bytes(status.wire_bytes));
    if let Some(left) = left(status) {
        text.push_str(&format!(", {left} left"));
    }
    if let Some(eta) = status.eta_ms.filter(|_| status.outcome.is_none()) {
        text.push_str(&format!(", ETA {}", show_ms(eta)));
    }
    match &status.reason {
        Some(reason) if status.outcome.is_none() => text.push_str(&format!("; {}", reason.text)),
        Some(_) | None => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let rows = [["A".to_owned(), "B".to_owned()], ["long".to_owned(), "x".to_owned()]];
        assert_eq!(table(&rows), "A     B\nlong  x\n");
    }
}
