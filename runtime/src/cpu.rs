//! What this processor can do, compared with what the code needs.

use std::arch::x86_64::{__cpuid, __cpuid_count};

use nextc_abi::Target;

use crate::error::Error;

/// The variable that names the CPU whose code is to be used, where there is code for several.
pub const CHOICE: &str = "NEXTC_CPU";

/// True if this processor has what the code for a machine uses, and the kernel lets this process use it.
pub fn suits(target: &Target) -> bool {
    missing_features(&target.features).is_empty() && request_tiles(&target.features).is_ok()
}

/// Which of the machines that there is code for, the best first, this one is: the first that `suits`, or the one that is `asked` for. If
/// there is none, the last: its use is refused, other commands work.
/// # Errors
/// [`Error::Version`] if no code is for the CPU that is asked for.
pub fn choose(targets: &[&Target], asked: Option<&str>, suits: impl Fn(&Target) -> bool) -> Result<usize, Error> {
    if targets.len() < 2 {
        return Ok(0);
    }
    match asked {
        Some(name) => targets.iter().position(|t| t.cpu == name).ok_or_else(|| Error::Version {
            asked: name.to_owned(),
            known: targets.iter().map(|t| format!("`{}`", t.cpu)).collect::<Vec<_>>().join(", "),
        }),
        None => {
            let first = targets.iter().position(|target| suits(target));
            Ok(first.unwrap_or(targets.len() - 1))
        }
    }
}

/// Features of `needed` (in LLVM's spelling) that this processor lacks. Names that say nothing about vector code are
/// taken as there.
pub fn missing_features(needed: &[String]) -> Vec<String> {
    needed.iter().map(|f| f.trim_start_matches('+')).filter(|f| has(f) == Some(false)).map(str::to_owned).collect()
}

/// Whether the processor has a feature; `None` for a name that is not known here.
fn has(feature: &str) -> Option<bool> {
    macro_rules! detect {
        ($($llvm:literal = $rust:tt),* $(,)?) => {
            match feature { $( $llvm => Some(std::is_x86_feature_detected!($rust)), )* other => has_by_cpuid(other) }
        };
    }
    detect! {
        "sse3" = "sse3", "ssse3" = "ssse3", "sse4.1" = "sse4.1", "sse4.2" = "sse4.2", "popcnt" = "popcnt",
        "avx" = "avx", "avx2" = "avx2", "fma" = "fma", "f16c" = "f16c", "bmi" = "bmi1", "bmi2" = "bmi2", "lzcnt" = "lzcnt",
        "movbe" = "movbe", "avx512f" = "avx512f", "avx512cd" = "avx512cd", "avx512bw" = "avx512bw", "avx512dq" = "avx512dq",
        "avx512vl" = "avx512vl", "avx512ifma" = "avx512ifma", "avx512vbmi" = "avx512vbmi", "avx512vbmi2" = "avx512vbmi2",
        "avx512vnni" = "avx512vnni", "avx512bitalg" = "avx512bitalg", "avx512vpopcntdq" = "avx512vpopcntdq",
        "avx512bf16" = "avx512bf16", "avx512fp16" = "avx512fp16", "avxvnni" = "avxvnni", "gfni" = "gfni", "vaes" = "vaes",
        "vpclmulqdq" = "vpclmulqdq",
    }
}

/// Features that the standard library does not report.
fn has_by_cpuid(feature: &str) -> Option<bool> {
    let bit = match feature {
        "amx-bf16" => 22,
        "amx-tile" => 24,
        "amx-int8" => 25,
        _ => return None,
    };
    Some(leaf7_edx() >> bit & 1 == 1)
}

fn leaf7_edx() -> u32 {
    if __cpuid(0).eax < 7 {
        return 0;
    }
    __cpuid_count(7, 0).edx
}

/// Asks the kernel for tile registers, if the code uses them; the threads that are started later inherit the permission.
/// # Errors
/// The operating system's.
pub fn request_tiles(needed: &[String]) -> std::io::Result<()> {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    if !needed.iter().any(|f| f.trim_start_matches('+').starts_with("amx-")) {
        return Ok(());
    }
    // SAFETY: this call only widens what the process may use.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// The processor's name.
pub fn name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|l| l.starts_with("model name"));
    line.and_then(|l| l.split(':').nth(1)).map_or_else(|| "x86-64".to_owned(), |n| n.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_chosen_that_is_here() {
        let target = |cpu: &str| Target { cpu: cpu.to_owned(), ..Target::default() };
        let [absent, here, least] = ["absent", "here", "least"].map(target);
        let choose =
            |targets: &[&Target], asked| choose(targets, asked, |t| t.cpu != "absent").map_err(|e| e.to_string());
        assert_eq!(choose(&[&absent, &here, &least], None), Ok(1));
        assert_eq!(choose(&[&here, &least], None), Ok(0));
        assert_eq!(choose(&[&absent, &absent], None), Ok(1));
        assert_eq!(choose(&[&here, &least], Some("least")), Ok(1));
        assert_eq!(choose(&[&absent], Some("least")), Ok(0));
        let error = choose(&[&here, &least], Some("z80")).expect_err("there is none");
        assert_eq!(error, "there is no code for `z80` (`NEXTC_CPU`), expected `here`, `least`");
    }

    #[test]
    fn unknown_names_are_not_missed() {
        let names = ["+cx16", "sahf", "sse3"].map(str::to_owned);
        assert_eq!(missing_features(&names), Vec::<String>::new());
    }
}
