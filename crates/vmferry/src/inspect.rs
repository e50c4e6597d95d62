//! `vmferry inspect`.

use std::process::ExitCode;

use vmferry_host::qemu::{QemuGuest, Severity};

use crate::cli::InspectArgs;
use crate::output::{print_bytes, print_json};

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let mut guest = QemuGuest::connect(&args.qmp, args.pid)?;
    let inspection = vmferry_host::inspect(&mut guest)?;
    if args.json {
        print_json(&inspection)?;
    } else {
        let mut text = String::new();
        for finding in &inspection.findings {
            let severity = match finding.severity {
                Severity::Ok => "ok     ",
                Severity::Warning => "warning",
                Severity::Unfit => "UNFIT  ",
            };
            text.push_str(&format!("{severity}  {}\n", finding.what));
            for (label, words) in [("why", &finding.why), ("change", &finding.change)] {
                if !words.is_empty() {
                    text.push_str(&format!("         {label}: {words}\n"));
                }
            }
        }
        let verdict =
            if inspection.can_be_moved() { "This guest can be moved." } else { "This guest cannot be moved as it is." };
        print_bytes(format!("{text}{verdict}\n").as_bytes())?;
    }
    Ok(if inspection.can_be_moved() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
