//! `vmferry inspect`.

use std::process::ExitCode;

use vmferry_host::qemu::{QemuGuest, Severity};

use crate::cli::InspectArgs;
use crate::output::print_json;

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let mut guest = QemuGuest::connect(&args.qmp, args.pid)?;
    let inspection = vmferry_host::inspect(&mut guest)?;
    if args.json {
        print_json(&inspection)?;
    } else {
        for finding in &inspection.findings {
            match finding.severity {
                Severity::Ok => println!("ok       {}", finding.what),
                Severity::Warning => println!("warning  {}", finding.what),
                Severity::Unfit => println!("UNFIT    {}", finding.what),
            }
            for (label, text) in [("why", &finding.why), ("change", &finding.change)] {
                if !text.is_empty() {
                    println!("         {label}: {text}");
                }
            }
        }
        let verdict =
            if inspection.can_be_moved() { "This guest can be moved." } else { "This guest cannot be moved as it is." };
        println!("{verdict}");
    }
    Ok(if inspection.can_be_moved() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
