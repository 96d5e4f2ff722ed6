//! Executables for a GPU, on a machine without one: what they say there, and with a stand-in for the driver
//! (`stand_in/driver.c`) that runs the kernels' code for the processor, that memory, copies, launches and their order
//! are right.

mod sample;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use sample::{How, WIDTH, link};
use tempfile::TempDir;

/// A linked toy model for a GPU beside a stand-in for the driver.
struct Exe {
    dir: TempDir,
}

impl Exe {
    fn new(config_only: bool) -> Self {
        Self::of(How { config_only, ..How::default() })
    }

    fn of(how: How) -> Self {
        let dir = tempfile::tempdir().unwrap();
        link(&dir.path().join("toy"), How { stand_in: true, ..how }).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/driver.c");
        fs::create_dir(dir.path().join("driver")).unwrap();
        sample::compile_c(&source, &dir.path().join("driver/libcuda.so.1"));
        Self { dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, settings: &[(&str, &str)], args: &[&str]) -> Output {
        let mut command = Command::new(self.path("toy"));
        command.args(args).current_dir(self.dir.path()).env("LD_LIBRARY_PATH", self.path("driver"));
        sample::output(command.envs(settings.iter().copied()))
    }

    fn stdout(&self, settings: &[(&str, &str)], args: &[&str]) -> String {
        let output = self.run(settings, args);
        assert!(output.status.success(), "{args:?} {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The message of a run that fails with status 1.
    fn error(&self, settings: &[(&str, &str)], args: &[&str]) -> String {
        let output = self.run(settings, args);
        assert_eq!(
            output.status.code(),
            Some(1),
            "{args:?} {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stderr).unwrap()
    }

    /// The rows of a tensor that `eval` writes for the ids `text`.
    fn eval(&self, settings: &[(&str, &str)], text: &str, args: &[&str], tensor: &str) -> Vec<Vec<f32>> {
        fs::write(self.path("ids.json"), text).unwrap();
        self.stdout(settings, &[&["eval", "--tokens", "ids.json", "--out", "out.safetensors"], args].concat());
        let bytes = fs::read(self.path("out.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor(tensor).unwrap();
        let values: Vec<f32> = data.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        values.chunks(WIDTH).map(<[f32]>::to_vec).collect()
    }
}

const IDS: [u32; 13] = [3, 0, 15, 7, 7, 2, 9, 4, 11, 1, 5, 6, 8];

#[test]
fn steps_of_all_sizes_give_what_the_kernels_compute() {
    let exe = Exe::new(false);
    let text = format!("{IDS:?}");
    for settings in [&[][..], &[("NEXTC_LAUNCH", "stream")], &[("NEXTC_LAUNCH", "trace")]] {
        for args in [&[][..], &["--mode", "decode"], &["--step-tokens", "5"]] {
            assert_eq!(exe.eval(settings, &text, args, "logits"), sample::logits(&IDS), "{settings:?} {args:?}");
        }
        let batch = "[[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]";
        for args in [&[][..], &["--mode", "decode"], &["--step-tokens", "2"]] {
            let sequence = exe.eval(settings, batch, args, "logits.0");
            assert_eq!(sequence, sample::logits(&[3, 4, 5, 6, 7, 8]), "{settings:?} {args:?}");
            assert_eq!(
                exe.eval(settings, batch, args, "logits.2"),
                sample::logits(&[10, 11, 12]),
                "{settings:?} {args:?}"
            );
        }
    }
}

#[test]
fn binaries_go_before_texts_where_the_driver_takes_them() {
    for taken in [true, false] {
        let exe = Exe::of(How { binaries: Some(taken), ..How::default() });
        assert_eq!(exe.eval(&[], &format!("{IDS:?}"), &[], "logits"), sample::logits(&IDS), "{taken}");
    }
}

/// What is launched, in order.
fn launches(exe: &Exe, how: &str) -> Vec<String> {
    let log = exe.path(how);
    exe.eval(
        &[("NEXTC_LAUNCH", how), ("STAND_IN_LOG", log.to_str().unwrap())],
        &format!("{IDS:?}"),
        &["--mode", "decode"],
        "logits",
    );
    fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn graphs_launch_what_streams_do() {
    let exe = Exe::new(false);
    let streamed = launches(&exe, "stream");
    assert_eq!(streamed.len(), 5 * IDS.len());
    assert_eq!(streamed[..2], ["nextc_kernel_0 1 blocks", "nextc_kernel_1 1 blocks"]);
    assert_eq!(launches(&exe, "graph"), streamed);
}

#[test]
fn sequences_generate_what_they_would_alone() {
    let exe = Exe::new(false);
    fs::write(exe.path("ids.json"), "[[3, 4], [5, 6, 7]]").unwrap();
    let args = ["generate", "--tokens", "ids.json", "--max-new-tokens", "9", "--temperature", "0", "--ignore-eos"];
    let args = [&args[..], &["--draft-tokens", "0", "--json"]].concat();
    let report: serde_json::Value = serde_json::from_str(exe.stdout(&[], &args).lines().last().unwrap()).unwrap();
    for (i, prompt) in [vec![3, 4], vec![5, 6, 7]].into_iter().enumerate() {
        let mut tokens = prompt.clone();
        for _ in 0..9 {
            let logits = sample::logits(&tokens).pop().unwrap();
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            tokens.push(logits.iter().position(|&x| x == best).unwrap() as u32);
        }
        assert_eq!(report["sequences"][i]["tokens"], serde_json::json!(tokens[prompt.len()..]), "{report}");
    }
}

#[test]
fn batches_that_are_filled_up_give_the_rows_of_their_sequences() {
    let exe = Exe::new(false);
    // of nine the step has ten
    let batch: Vec<Vec<u32>> = (0..9).map(|i| vec![i, 15 - i, 3 * i % 7]).collect();
    for args in [&[][..], &["--mode", "decode"]] {
        for sequence in [0, 8] {
            let rows = exe.eval(&[], &format!("{batch:?}"), args, &format!("logits.{sequence}"));
            assert_eq!(rows, sample::logits(&batch[sequence]), "{args:?} {sequence}");
        }
    }
    let args =
        ["bench", "--random-weights", "--json", "--prefill", "2", "--decode", "3", "--draft", "2", "--batch", "9"];
    let exe = Exe::new(true);
    let report: serde_json::Value = serde_json::from_str(exe.stdout(&[], &args).lines().last().unwrap()).unwrap();
    assert!(
        report["rows"].as_array().unwrap().iter().all(|row| row["tokens_per_s"].as_f64().unwrap() > 0.0),
        "{report}"
    );
}

#[test]
fn drafts_get_the_hidden_rows_of_the_step() {
    let exe = Exe::new(false);
    let rows = exe.eval(&[], "[3, 0, 15, 7]", &["--mtp", "1"], "mtp_logits");
    assert_eq!(rows[..3], sample::logits(&[3, 0, 15, 7])[1..]);
}

#[test]
fn bench_makes_weights_up_and_times_kernels() {
    let exe = Exe::new(true);
    let args = ["bench", "--random-weights", "--json", "--profile", "--prefill", "8", "--decode", "4", "--depth", "6"];
    let report: serde_json::Value = serde_json::from_str(exe.stdout(&[], &args).lines().last().unwrap()).unwrap();
    assert_eq!(report["device"], "stand-in");
    assert!(report["read_bytes_per_s"].as_f64().unwrap() > 0.0);
    for row in report["rows"].as_array().unwrap() {
        assert!(row["tokens_per_s"].as_f64().unwrap() > 0.0, "{row}");
        let kernels = row["kernels"].as_array().unwrap();
        assert_eq!(kernels.len(), 5, "{row}");
        assert!(kernels.iter().all(|k| k["us_per_run"].as_f64().unwrap() > 0.0), "{row}");
    }
}

#[test]
fn drafts_go_on_from_what_lies_on_the_device() {
    let exe = Exe::new(true);
    let args =
        ["bench", "--random-weights", "--json", "--prefill", "2", "--decode", "1", "--draft", "1,3", "--batch", "1,3"];
    let report: serde_json::Value = serde_json::from_str(exe.stdout(&[], &args).lines().last().unwrap()).unwrap();
    let drafts: Vec<_> = report["rows"].as_array().unwrap().iter().filter(|row| row["kind"] == "draft").collect();
    assert_eq!(drafts.len(), 4);
    assert!(drafts.iter().all(|row| row["tokens_per_s"].as_f64().unwrap() > 0.0), "{report}");
}

#[test]
fn what_is_missing_is_said() {
    let exe = Exe::new(false);
    fs::write(exe.path("ids.json"), "[1, 2]").unwrap();
    let eval = ["eval", "--tokens", "ids.json"];
    let check = |settings: &[(&str, &str)], expected: &str| {
        let error = exe.error(settings, &eval);
        assert!(error.contains(expected), "expected `{expected}`: {error}");
    };
    check(&[("STAND_IN_CAPABILITY", "80")], "stand-in has compute capability 8.0, which cannot run code for `sm_90a`");
    check(&[("STAND_IN_CAPABILITY", "0")], "the NVIDIA driver shows no GPU");
    check(&[("STAND_IN_VERSION", "12040")], "the NVIDIA driver supports CUDA 12.4, expected 12.8 or newer");
    check(&[("STAND_IN_MEMORY", "5000000")], "stand-in: states need 2097152 B of its memory, ");
    check(&[("NEXTC_LAUNCH", "fast")], "`NEXTC_LAUNCH` is `fast`");
    let nothing = tempfile::tempdir().unwrap();
    // the last one stands, and has no driver in it
    let none = nothing.path().to_str().unwrap();
    check(&[("LD_LIBRARY_PATH", none)], "no NVIDIA driver on this machine (`libcuda.so.1` cannot be loaded)");
    fs::remove_file(exe.path("toy.so")).unwrap();
    check(&[], "kernel `embed`: the NVIDIA driver cannot compile it: CUDA_ERROR_INVALID_PTX (an error)\nptxas: line 1");
    exe.stdout(&[("LD_LIBRARY_PATH", none)], &["info", "--verify"]);
}

#[test]
fn a_fault_of_a_kernel_is_an_error_that_tracing_puts_in_its_place() {
    let exe = Exe::new(false);
    fs::write(exe.path("ids.json"), "[1, 2]").unwrap();
    let fault = ("STAND_IN_FAULT", "nextc_kernel_3");
    let error = exe.error(&[fault], &["eval", "--tokens", "ids.json"]);
    assert!(error.contains("program `step`") && error.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    let error = exe.error(&[fault, ("NEXTC_LAUNCH", "trace")], &["eval", "--tokens", "ids.json"]);
    assert!(error.contains("program `step`, kernel `read` (kernel 3)"), "{error}");
}
