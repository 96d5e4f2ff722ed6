//! A linked executable runs: it gives the logits that it should, however its tokens are cut into steps, and says what is wrong
//! with files that were damaged.

mod sample;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nextc_abi::{Footer, Metadata, SectionKind, WeightsPlace};
use sample::{How, MAX_CONTEXT, WIDE, WIDTH, link};
use tempfile::TempDir;

/// A linked toy model in a directory of its own.
struct Exe {
    dir: TempDir,
    path: PathBuf,
}

impl Exe {
    fn new(how: How) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("toy");
        link(&path, how).unwrap();
        Self { dir, path }
    }

    fn run(&self, args: &[&str]) -> Output {
        sample::output(Command::new(&self.path).args(args).current_dir(self.dir.path()))
    }

    /// Standard output of a run that succeeds.
    fn stdout(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The message of a run that fails with status 1.
    fn error(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    /// The logits that `eval` writes for the ids `text`, with further arguments.
    fn eval(&self, text: &str, args: &[&str]) -> Tensors {
        fs::write(self.dir.path().join("ids.json"), text).unwrap();
        let all = [&["eval", "--tokens", "ids.json", "--out", "out.safetensors"], args].concat();
        self.stdout(&all);
        Tensors(fs::read(self.dir.path().join("out.safetensors")).unwrap())
    }

    fn footer(&self) -> Footer {
        let bytes = fs::read(&self.path).unwrap();
        Footer::parse(&bytes[bytes.len() - Footer::BYTES as usize..], bytes.len() as u64).unwrap()
    }

    /// Flips a bit of the file.
    fn damage(&self, file: &Path, offset: u64) {
        let file = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }
}

#[test]
fn the_best_code_is_picked_at_start() {
    let exe = Exe::new(How { two_cpus: true, ..How::default() });
    let wide = ["avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd"].map(str::to_owned);
    let expected = if machine_has(&wide) { WIDE } else { "x86-64-v3" };
    let info = |cpu: Option<&str>| {
        let mut command = Command::new(&exe.path);
        command.args(["info", "--json"]).envs(cpu.map(|name| ("NEXTC_CPU", name)));
        let output = sample::output(&mut command);
        let text = if output.status.success() { output.stdout } else { output.stderr };
        String::from_utf8(text).unwrap()
    };
    let of = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let best = of(&info(None));
    assert_eq!(
        (&best["cpu"], &best["cpus"][1]),
        (&expected.into(), &if expected == WIDE { "x86-64-v3" } else { WIDE }.into())
    );
    assert_eq!(of(&info(Some("x86-64-v3")))["cpu"], "x86-64-v3");
    assert!(info(Some("z80")).contains("there is no code for `z80` (`NEXTC_CPU`), expected `x86-64-v4`, `x86-64-v3`"));
    let one = Exe::new(How::default());
    assert_eq!(exe.eval("[1, 2, 3]", &[]).0, one.eval("[1, 2, 3]", &[]).0);
}

/// True if this machine has all of these features.
fn machine_has(features: &[String]) -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags: Vec<&str> = flags.lines().find(|l| l.starts_with("flags")).unwrap().split_whitespace().collect();
    features.iter().all(|f| flags.contains(&f.as_str()))
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        let tensors = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let data = tensors.tensor(name).unwrap();
        let values: Vec<f32> = data.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        values.chunks(WIDTH).map(<[f32]>::to_vec).collect()
    }
}

#[test]
fn prefill_decode_pieces_and_batches_give_the_same() {
    let exe = Exe::new(How::default());
    let ids: Vec<u32> = vec![3, 0, 15, 7, 7, 2, 9, 4, 11, 1, 5, 6, 8];
    let text = format!("{ids:?}");
    for args in [
        &[][..],
        &["--mode", "decode"],
        &["--step-tokens", "5"],
        &["--threads", "1"],
        &["--threads", "5", "--mode", "decode"],
    ] {
        assert_eq!(exe.eval(&text, args).rows("logits"), sample::logits(&ids), "{args:?}");
    }
    let batch = "[[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]";
    for args in [&[][..], &["--mode", "decode"], &["--step-tokens", "2"]] {
        let out = exe.eval(batch, args);
        assert_eq!(out.rows("logits.0"), sample::logits(&[3, 4, 5, 6, 7, 8]), "{args:?}");
        assert_eq!(out.rows("logits.1"), sample::logits(&[9]), "{args:?}");
        assert_eq!(out.rows("logits.2"), sample::logits(&[10, 11, 12]), "{args:?}");
    }
}

#[test]
fn drafts_follow_each_position() {
    let exe = Exe::new(How::default());
    let ids: Vec<u32> = vec![3, 0, 15, 7];
    for args in [&["--mtp", "3"][..], &["--mtp", "3", "--mode", "decode"], &["--mtp", "3", "--step-tokens", "3"]] {
        let rows = exe.eval(&format!("{ids:?}"), args).rows("mtp_logits");
        assert_eq!(rows.len(), ids.len() * 3);
        for t in 0..ids.len() {
            let mut sequence = ids[..=t].to_vec();
            let mut after = sample::logits(&sequence).pop().unwrap();
            for k in 0..3 {
                let known = if k == 0 { ids.get(t + 1).copied() } else { None };
                sequence.push(known.unwrap_or_else(|| argmax(&after)));
                after = sample::logits(&sequence).pop().unwrap();
                assert_eq!(rows[t * 3 + k], after, "{args:?} position {t} draft {k}");
            }
        }
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&x| x == best).unwrap() as u32
}

#[test]
fn perplexity_is_that_of_the_known_tokens_in_windows() {
    let exe = Exe::new(How::default());
    let ids: Vec<u32> = (0..30).map(|i| i * 5 % 16).collect();
    fs::write(exe.dir.path().join("ids.json"), format!("{ids:?}")).unwrap();
    let text = exe.stdout(&["eval", "--tokens", "ids.json", "--window", "8"]);
    let report: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let mut nats = 0.0;
    for (w, window) in ids.chunks(8).enumerate() {
        for (i, row) in sample::logits(window).iter().enumerate() {
            if let Some(&target) = ids.get(w * 8 + i + 1) {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                nats += sum.ln() - f64::from(row[target as usize]);
            }
        }
    }
    assert_eq!(report["tokens"], 29);
    assert!((report["nats_per_token"].as_f64().unwrap() - nats / 29.0).abs() < 1e-6, "{report} {nats}");
}

#[test]
fn greedy_tokens_come_from_the_same_logits() {
    let exe = Exe::new(How::default());
    fs::write(exe.dir.path().join("ids.json"), "[[3, 4], [5, 6, 7]]").unwrap();
    let args = [
        "generate",
        "--tokens",
        "ids.json",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
        "--draft-tokens",
        "0",
        "--ignore-eos",
        "--json",
    ];
    let report: serde_json::Value = serde_json::from_str(exe.stdout(&args).lines().last().unwrap()).unwrap();
    for (i, prompt) in [vec![3, 4], vec![5, 6, 7]].into_iter().enumerate() {
        let mut tokens = prompt.clone();
        for _ in 0..5 {
            tokens.push(argmax(sample::logits(&tokens).last().unwrap()));
        }
        assert_eq!(report["sequences"][i]["tokens"], serde_json::json!(tokens[prompt.len()..]), "{report}");
    }
}

#[test]
fn wrong_tokens_and_long_contexts_are_errors_before_anything_runs() {
    let exe = Exe::new(How::default());
    let eval = |text: &str| {
        fs::write(exe.dir.path().join("ids.json"), text).unwrap();
        exe.error(&["eval", "--tokens", "ids.json", "--out", "o.safetensors"])
    };
    assert!(eval("[1, 16]").contains("token 16 (number 1 of sequence 0): the model has ids 0 to 15"));
    let long: Vec<u64> = (0..MAX_CONTEXT + 3).map(|_| 1).collect();
    assert!(eval(&format!("{long:?}")).contains("27 tokens are 3 more than the context of 24"));
    assert!(eval("[[1], []]").contains("sequence 1 has no tokens"));
    assert!(eval("{}").contains("expected a JSON array"));
    assert!(eval("[1, -1]").contains("-1"));
    assert!(!exe.dir.path().join("o.safetensors").exists());
    assert_eq!(fs::read_dir(exe.dir.path()).unwrap().count(), 3, "toy, toy.weights, ids.json");
    assert_eq!(exe.run(&["eval"]).status.code(), Some(2));
}

#[test]
fn bench_and_info_speak_json() {
    let exe = Exe::new(How { config_only: true, ..How::default() });
    let args =
        ["bench", "--random-weights", "--json", "--prefill", "8", "--decode", "4", "--depth", "0,6", "--batch", "1,3"];
    let report: serde_json::Value = serde_json::from_str(exe.stdout(&args).lines().last().unwrap()).unwrap();
    assert_eq!(report["model"], "toy");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 8);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("min") <= number("tokens_per_s") && number("tokens_per_s") <= number("max"), "{row}");
        assert!(number("bytes_per_token") > 0.0 && number("roofline_share") > 0.0, "{row}");
    }
    let info: serde_json::Value = serde_json::from_str(&exe.stdout(&["info", "--json"])).unwrap();
    assert_eq!(info["payload_offset"], exe.footer().payload_offset);
    assert_eq!(info["state_bytes_per_sequence"], 64 + 8 * 192);
    assert_eq!(info["kv_bytes_per_token"], 128);
    assert_eq!(info["arena_bytes"], 2048 * 192 + 128);
    assert!(exe.error(&["eval", "--tokens", "ids.json"]).contains("ids.json"));
    fs::write(exe.dir.path().join("ids.json"), "[1]").unwrap();
    assert!(exe.error(&["eval", "--tokens", "ids.json"]).contains("there are no weights"));
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for embed in [false, true] {
        let how = How { embed, ..How::default() };
        let [a, b] = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            let report = link(&path, how).unwrap();
            let weights = report.weights_file.map(|w| fs::read(w).unwrap());
            (fs::read(&path).unwrap(), weights)
        });
        assert!(a == b);
        assert_eq!(a.1.is_some(), !embed);
    }
    let mode = fs::metadata(dir.path().join("a")).unwrap().permissions().mode();
    assert_eq!(mode & 0o500, 0o500);
}

#[test]
fn embedded_weights_work_without_the_file() {
    let exe = Exe::new(How { embed: true, ..How::default() });
    assert!(!exe.dir.path().join("toy.weights").exists());
    assert_eq!(exe.eval("[3, 9, 2]", &[]).rows("logits"), sample::logits(&[3, 9, 2]));
    exe.stdout(&["info", "--verify"]);
    let metadata = metadata(&exe);
    assert_eq!(metadata.weights.place, WeightsPlace::Embedded);
    let matrix = &metadata.weights.entries[1];
    exe.damage(&exe.path, exe.footer().section(SectionKind::Weights).offset + matrix.offset + 100);
    assert!(exe.error(&["info", "--verify"]).contains("weight `matrix`"));
}

fn metadata(exe: &Exe) -> Metadata {
    let section = *exe.footer().section(SectionKind::Metadata);
    let bytes = fs::read(&exe.path).unwrap();
    serde_json::from_slice(&bytes[section.offset as usize..][..section.bytes as usize]).unwrap()
}

#[test]
fn matrices_are_packed_in_tiles() {
    let exe = Exe::new(How::default());
    let entry = metadata(&exe).weights.entries[1].clone();
    let packed = fs::read(exe.dir.path().join("toy.weights")).unwrap();
    // [2, 20, 24]: 20 rows take two tiles, 24 columns take 32
    assert_eq!(entry.bytes, 4 * 32 * 16 * 2);
    for (outer, row, column) in (0..2u64).flat_map(|o| (0..32).flat_map(move |r| (0..32).map(move |c| (o, r, c)))) {
        let tile = outer * 2 + row / 16;
        let at = (entry.offset + tile * 32 * 16 * 2 + ((column / 2) * 32 + (row % 16) * 2 + column % 2) * 2) as usize;
        let found = f32::from_bits(u32::from(u16::from_le_bytes([packed[at], packed[at + 1]])) << 16);
        let expected =
            if row < 20 && column < 24 { sample::matrix_value((outer * 20 + row) * 24 + column) } else { 0.0 };
        assert_eq!(found, expected, "{outer} {row} {column}");
    }
}

#[test]
fn damage_is_found_and_named() {
    let check = |damage: &dyn Fn(&Exe), args: &[&str], expected: &str| {
        let exe = Exe::new(How::default());
        damage(&exe);
        let error = exe.error(args);
        assert!(error.contains(expected), "expected `{expected}`: {error}");
    };
    let info = &["info"][..];
    let section = |kind| move |exe: &Exe| exe.damage(&exe.path, exe.footer().section(kind).offset + 20);
    check(&section(SectionKind::Code), info, "section `code`");
    check(&section(SectionKind::Metadata), info, "section `metadata`");
    check(&|exe| exe.damage(&exe.path, fs::metadata(&exe.path).unwrap().len() - 40), info, "footer is damaged");
    check(&|exe| cut(&exe.path, 1), info, "no payload");
    check(
        &|exe| cut(&exe.path, fs::metadata(&exe.path).unwrap().len() - exe.footer().payload_offset),
        info,
        "stripped",
    );

    fs::write(std::env::temp_dir().join("nextc-link-test-ids.json"), "[1, 2]").unwrap();
    let ids = std::env::temp_dir().join("nextc-link-test-ids.json");
    let eval = &["eval", "--tokens", ids.to_str().unwrap()][..];
    let weights = |exe: &Exe| exe.dir.path().join("toy.weights");
    check(&|exe| fs::remove_file(weights(exe)).unwrap(), eval, "toy.weights");
    check(&|exe| cut(&weights(exe), 4096), eval, "cut short");
    check(&|exe| exe.damage(&weights(exe), 30), eval, "another build");
    check(&|exe| exe.damage(&weights(exe), 0), eval, "not a weights file");
    check(&|exe| exe.damage(&weights(exe), 4096 + 10), &["info", "--verify"], "weight `embed`");
}

fn cut(path: &Path, bytes: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - bytes).unwrap();
}

#[test]
fn links_to_the_executable_find_the_weights() {
    let exe = Exe::new(How::default());
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("other-name");
    std::os::unix::fs::symlink(&exe.path, &link).unwrap();
    let linked = Exe { dir: elsewhere, path: link };
    assert_eq!(linked.eval("[3]", &[]).rows("logits"), sample::logits(&[3]));
}

#[test]
fn a_build_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let error = link(&dir.path().join("missing/toy"), How::default()).unwrap_err();
    assert!(error.to_string().contains("directory does not exist"));
    fs::create_dir(dir.path().join("toy.weights")).unwrap();
    link(&dir.path().join("toy"), How::default()).unwrap_err();
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["toy.weights"]);
}
