//! What the first process asks of the kernel that the standard library has no words for: mounts, modules, the serial port's
//! mode, power.
#![expect(unsafe_code, reason = "mount, finit_module, tcsetattr and reboot have no safe form in the standard library")]

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::{Duration, Instant};

/// Where the guest speaks.
pub(crate) const SERIAL_PORT: &str = "/dev/ttyS0";

/// Where the kernel's modules for virtio are, if it needs any; by name in the order in which they are loaded.
const MODULES: &str = "/modules";
/// How long to wait for a device that is being found.
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// How long to wait for the machine to be off.
const POWER_OFF_WAIT: Duration = Duration::from_secs(2);

/// Mounts what the guest reads and opens the serial port as lines of plain bytes.
///
/// # Errors
/// When there is no serial port or the kernel refuses a mount.
pub(crate) fn prepare() -> io::Result<File> {
    mount(c"devtmpfs", c"/dev")?;
    mount(c"proc", c"/proc")?;
    mount(c"sysfs", c"/sys")?;
    let port = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(SERIAL_PORT)?;
    make_plain(&port)?;
    Ok(port)
}

/// Loads the kernel's modules for virtio devices. What is loaded stays so.
///
/// # Errors
/// When the kernel refuses one.
pub(crate) fn load_modules() -> io::Result<()> {
    let mut modules = match fs::read_dir(MODULES) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    modules.sort();
    for path in modules {
        let module = File::open(&path)?;
        // SAFETY: the descriptor is open for the whole call, and the parameters are an empty C string. What the module
        // does in the kernel is no concern of this process's memory.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
        let error = io::Error::last_os_error();
        if result != 0 && error.raw_os_error() != Some(libc::EEXIST) {
            return Err(io::Error::new(error.kind(), format!("cannot load {}: {error}", path.display())));
        }
    }
    Ok(())
}

/// Waits until the kernel has found a device.
///
/// # Errors
/// When it finds none.
pub(crate) fn wait_for(path: &str) -> io::Result<()> {
    let start = Instant::now();
    while !Path::new(path).exists() {
        if start.elapsed() > DEVICE_WAIT {
            let message = format!("there is no {path}: the machine has no such device, or the kernel no driver for it");
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Powers the machine off.
pub(crate) fn power_off() -> ! {
    // Gives the serial port's last bytes time to leave; there is no file system to write out.
    std::thread::sleep(Duration::from_millis(50));
    for command in [libc::RB_POWER_OFF, libc::RB_AUTOBOOT] {
        // SAFETY: `reboot` takes a plain number and touches no memory of this process.
        unsafe { libc::reboot(command) };
        // Without power management the first returns; then the machine is restarted, which `-no-reboot` makes an exit.
        std::thread::sleep(POWER_OFF_WAIT);
    }
    // The first process ends only where the kernel knows neither way; its panic is then all that can be had.
    std::process::abort()
}

fn mount(file_system: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: source, target and type are C strings that outlive the call; the flags are 0 and the data is null, which
    // these file systems take as "no options".
    let result = unsafe { libc::mount(file_system.as_ptr(), target.as_ptr(), file_system.as_ptr(), 0, ptr::null()) };
    let error = io::Error::last_os_error();
    // The kernel may have mounted /dev itself.
    if result == 0 || error.raw_os_error() == Some(libc::EBUSY) {
        Ok(())
    } else {
        let what = target.to_string_lossy();
        Err(io::Error::new(error.kind(), format!("cannot mount {what}: {error}")))
    }
}

/// Turns off the echo of what is read, and the change of line ends in what is written.
fn make_plain(port: &File) -> io::Result<()> {
    let mut settings = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the descriptor is open for the whole call and the pointer is to memory of the structure's size.
    let read = unsafe { libc::tcgetattr(port.as_raw_fd(), settings.as_mut_ptr()) };
    if read != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `tcgetattr` succeeded, so it wrote the whole structure.
    let mut settings = unsafe { settings.assume_init() };
    settings.c_lflag &= !(libc::ECHO | libc::ECHONL);
    settings.c_oflag &= !libc::OPOST;
    // SAFETY: the descriptor is open and the pointer is to an initialised structure, both for the whole call.
    let written = unsafe { libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &raw const settings) };
    if written == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
