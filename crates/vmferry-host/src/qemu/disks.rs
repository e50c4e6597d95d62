//! How QEMU reads the guest's disks: by the kernel's cache, straight into guest RAM, or by somebody else who writes there.

use serde_json::{Value, json};

use super::guest::QemuError;
use crate::qmp::QmpClient;

/// Drivers for whole devices of the host, on which SCSI commands of the guest may be passed on.
const HOST_DEVICES: &str = "host_";
/// Passes the guest's commands on to the kernel, which reads straight into guest RAM.
const PASSED_ON: &str = "nvme-io_uring";

/// The guest's disks.
pub(super) struct Disks {
    /// The block drivers in use, sorted.
    pub(super) drivers: Vec<String>,
    /// Whether some of them may be read straight into guest RAM.
    pub(super) are_read_directly: bool,
}

impl Disks {
    pub(super) fn of(qmp: &mut QmpClient) -> Result<Self, QemuError> {
        let Value::Array(nodes) = qmp.execute_with("query-named-block-nodes", json!({ "flat": true }))? else {
            return Err(unexpected());
        };
        let mut disks = Self { drivers: Vec::new(), are_read_directly: false };
        for node in &nodes {
            disks.drivers.push(node.get("drv").and_then(Value::as_str).ok_or_else(unexpected)?.to_owned());
            disks.are_read_directly |= is_read_directly(node).ok_or_else(unexpected)?;
        }
        disks.drivers.sort();
        disks.drivers.dedup();
        Ok(disks)
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
