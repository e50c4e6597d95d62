//! How QEMU reads the guest's disks: by the kernel's cache, straight into guest RAM, or by somebody else who writes there.

use serde_json::{Value, json};

use super::guest::QemuError;
use crate::qmp::QmpClient;

/// Drivers for whole devices of the host, on which SCSI commands of the guest may be passed on.
const HOST_DEVICES: &str = "host_";
/// Passes the guest's commands on to the kernel, which reads straight into guest RAM.
const PASSED_ON: &str = "nvme-io_uring";

/// Whether some of the guest's disks may be read straight into guest RAM.
pub(super) fn are_read_directly(qmp: &mut QmpClient) -> Result<bool, QemuError> {
    let read_directly = |node: &Value| is_read_directly(node).ok_or_else(unexpected);
    nodes(qmp)?.iter().try_fold(false, |any, node| Ok(any | read_directly(node)?))
}

/// The block drivers in use, sorted.
pub(super) fn drivers(qmp: &mut QmpClient) -> Result<Vec<String>, QemuError> {
    let driver = |node: &Value| Ok(node.get("drv").and_then(Value::as_str).ok_or_else(unexpected)?.to_owned());
    let mut drivers = nodes(qmp)?.iter().map(driver).collect::<Result<Vec<_>, QemuError>>()?;
    drivers.sort();
    drivers.dedup();
    Ok(drivers)
}

fn nodes(qmp: &mut QmpClient) -> Result<Vec<Value>, QemuError> {
    match qmp.execute_with("query-named-block-nodes", json!({ "flat": true }))? {
        Value::Array(nodes) => Ok(nodes),
        _ => Err(unexpected()),
    }
}

fn unexpected() -> QemuError {
    QemuError::unexpected("query-named-block-nodes", "it is no list of nodes with `drv` and `cache`")
}

fn is_read_directly(node: &Value) -> Option<bool> {
    let driver = node.get("drv")?.as_str()?;
    let direct = node.get("cache")?.get("direct")?.as_bool()?;
    Some(direct || driver.starts_with(HOST_DEVICES) || driver == PASSED_ON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_reads_are_told_from_cached_ones() {
        let node = |driver: &str, direct: bool| {
            let cache = json!({ "no-flush": false, "direct": direct, "writeback": true });
            json!({ "node-name": "disk", "drv": driver, "ro": false, "cache": cache })
        };
        assert_eq!(is_read_directly(&node("qcow2", false)), Some(false));
        assert_eq!(is_read_directly(&node("file", true)), Some(true));
        assert_eq!(is_read_directly(&node("host_device", false)), Some(true));
        assert_eq!(is_read_directly(&node("nvme-io_uring", false)), Some(true));
        assert_eq!(is_read_directly(&json!({ "drv": "file" })), None);
    }
}
