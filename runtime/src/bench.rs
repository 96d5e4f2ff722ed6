//! `bench`: the speed of prefill and decode, beside what the machine could do at best.

use std::time::Instant;

use clap::Args;
use nextc_abi::metadata::{NVPTX64, default_step_tokens};
use nextc_abi::{Cost, Model};
use serde_json::{Value, json};

use crate::artifact::Artifact;
use crate::cli::MachineArgs;
use crate::engine::draft::{DraftInput, HiddenRows};
use crate::engine::{Engine, LogitRows};
use crate::error::Error;
use crate::limits::Limits;
use crate::random::Random;
use crate::sample::rows::Row as SampledRow;
use crate::sample::settings::parse_number;
use crate::sample::{Choosing, Edits, Sampling};
use crate::shortlist::Shortlist;
use crate::state::SequenceId;
use crate::stats::median;
use crate::step::KernelTime;

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Lengths of prompts to process
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "512", value_parser = clap::value_parser!(u64).range(1..))]
    prefill: Vec<u64>,
    /// Numbers of tokens to generate one by one
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u64).range(1..))]
    decode: Vec<u64>,
    /// Tokens of steps that check drafts: a known token and the drafts after it
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..))]
    verify: Vec<u64>,
    /// Tokens that are drafted one after the other, each from the one before it
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..))]
    draft: Vec<u64>,
    /// Tokens already in the state
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "0")]
    depth: Vec<u64>,
    /// Sequences that run together
    #[arg(long, value_name = "SEQUENCES", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u64).range(1..=4096))]
    batch: Vec<u64>,
    /// Measurements of each row
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Prompts are processed in steps of at most this many tokens [default: 2048; on a GPU 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    step_tokens: Option<u64>,
    /// Decode with this temperature, instead of taking the most probable token
    #[arg(long, value_name = "X", value_parser = parse_number("temperature"), default_value_t = 0.0)]
    temperature: f64,
    /// Choose among the K most probable tokens, 0 for all
    #[arg(long, value_name = "K", value_parser = parse_number("top_k"), default_value_t = 0.0)]
    top_k: f64,
    /// Choose among the fewest tokens whose probabilities sum to X
    #[arg(long, value_name = "X", value_parser = parse_number("top_p"), default_value_t = 1.0)]
    top_p: f64,
    /// Make weights up; no weights file is needed
    #[arg(long)]
    random_weights: bool,
    /// Show how long each kernel takes in each row
    #[arg(long)]
    profile: bool,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: MachineArgs,
}

/// What a row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One step of many tokens.
    Prefill,
    /// Steps of one token.
    Decode,
    /// Tentative steps of a few tokens, none of which is accepted.
    Verify,
    /// Chains of drafts.
    Draft,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Verify => "verify",
            Self::Draft => "draft",
        }
    }

    /// How often one measurement does it.
    const fn rounds(self) -> u64 {
        match self {
            Self::Prefill | Self::Decode => 1,
            Self::Verify | Self::Draft => 16,
        }
    }

    /// The entry point that it measures.
    fn cost(self, engine: &Engine) -> Cost {
        let names: &[&str] = if self == Self::Draft { &["guess", "draft"] } else { &["step"] };
        names.iter().find_map(|name| engine.metadata().program(name)).map(|p| p.cost).unwrap_or_default()
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
struct Row {
    kind: Kind,
    tokens: u64,
    depth: u64,
    batch: u64,
}

/// Runs `bench`.
/// # Errors
/// [`Error`] says what cannot be measured.
pub fn run(artifact: Artifact, args: &BenchArgs) -> Result<(), Error> {
    let rows = rows(args);
    check_rows(&rows, &artifact.metadata().model)?;
    let sequences = args.batch.iter().copied().max().unwrap_or(1) as usize;
    let mut options = args.machine.engine(sequences);
    options.random_weights = args.random_weights;
    match args.step_tokens {
        Some(tokens) => options.step_tokens = tokens as usize,
        None if artifact.metadata().target.arch == NVPTX64 => {
            options.step_tokens = default_step_tokens(NVPTX64) as usize
        }
        None => {}
    }
    let mut engine = Engine::new(artifact, &options)?;
    let limits = engine.limits()?;
    let mut results = Vec::with_capacity(rows.len());
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k as usize,
        top_p: args.top_p,
        ..Sampling::default()
    };
    if !args.json {
        print_head(&engine, &limits);
    }
    for row in &rows {
        engine.profile(args.profile);
        let rates = measure(&mut engine, row, &sampling, args.repeats)?;
        let mut result = result(row, &rates, &engine, &limits, options.step_tokens as u64);
        if args.profile {
            result["kernels"] = kernels(&mut engine);
        }
        if !args.json {
            print_row(&result);
        }
        results.push(result);
    }
    if args.json {
        let metadata = engine.metadata();
        let report = json!({
            "device": engine.device(),
            "model": metadata.model.name,
            "weights_bytes": metadata.weights.bytes,
            "read_bytes_per_s": limits.read_bytes_per_s,
            "flops_per_s": limits.flops_per_s,
            "temperature": args.temperature,
            "rows": results,
        });
        println!("{report}");
    }
    Ok(())
}

fn rows(args: &BenchArgs) -> Vec<Row> {
    let mut rows = Vec::new();
    let kinds = [
        (Kind::Prefill, &args.prefill),
        (Kind::Decode, &args.decode),
        (Kind::Verify, &args.verify),
        (Kind::Draft, &args.draft),
    ];
    for (kind, lengths) in kinds {
        for &batch in &args.batch {
            for &depth in &args.depth {
                rows.extend(lengths.iter().map(|&tokens| Row { kind, tokens, depth, batch }));
            }
        }
    }
    rows
}

fn check_rows(rows: &[Row], model: &Model) -> Result<(), Error> {
    if !model.mtp && rows.iter().any(|r| r.kind == Kind::Draft) {
        return Err(Error::NoMtp { model: model.name.clone(), option: "--draft" });
    }
    let max_context = model.max_context;
    match rows.iter().find(|r| r.tokens.saturating_add(r.depth) > max_context) {
        None => Ok(()),
        Some(r) => Err(Error::Option {
            option: "--depth",
            reason: format!(
                "{} + {} tokens are {} more than the context of {max_context}",
                r.depth,
                r.tokens,
                r.tokens.saturating_add(r.depth) - max_context
            ),
        }),
    }
}

/// Tokens a second of each repetition; one more runs first and does not count.
fn measure(engine: &mut Engine, row: &Row, sampling: &Sampling, repeats: u32) -> Result<Vec<f64>, Error> {
    let mut rates = Vec::with_capacity(repeats as usize);
    for repeat in 0..=repeats {
        let ids: Vec<SequenceId> = (0..row.batch).map(|_| engine.new_sequence()).collect::<Result<_, _>>()?;
        for &id in ids.iter().filter(|_| row.depth > 0) {
            engine.pretend_past(id, row.depth)?;
        }
        let seconds = run_row(engine, row, &ids, &Sampling { seed: repeat.into(), ..sampling.clone() })?;
        if repeat > 0 {
            rates.push((row.tokens * row.batch * row.kind.rounds()) as f64 / seconds);
        }
        ids.into_iter().for_each(|id| engine.end_sequence(id));
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates)
}

/// Seconds that the row's tokens take. Token ids are random, so experts are chosen as in text.
fn run_row(engine: &mut Engine, row: &Row, ids: &[SequenceId], sampling: &Sampling) -> Result<f64, Error> {
    let vocab_size = engine.metadata().model.vocab_size.max(1);
    let mut random = Random(sampling.seed);
    let mut draw = |n: u64| (0..n).map(|_| (random.next_bits() % vocab_size) as u32).collect::<Vec<u32>>();
    let tokens: Vec<Vec<u32>> = ids.iter().map(|_| draw(row.tokens)).collect();
    let batch_of = |range: std::ops::Range<usize>| -> Vec<(SequenceId, &[u32])> {
        ids.iter().zip(&tokens).map(|(&id, t)| (id, &t[range.clone()])).collect()
    };
    let count = row.tokens as usize;
    let width = engine.metadata().model.hidden_size as usize;
    let hidden: Vec<f32> = (0..width * ids.len()).map(|_| random.between(-1.0, 1.0)).collect();
    let begun = Instant::now();
    for _ in 0..row.kind.rounds() {
        match row.kind {
            Kind::Prefill => engine.forward(&batch_of(0..count), LogitRows::Last)?,
            Kind::Verify => engine.forward_tentative(&batch_of(0..count), 0)?,
            Kind::Decode => {
                for i in 0..count {
                    engine.forward(&batch_of(i..i + 1), LogitRows::Last)?;
                    choose(engine, ids.len(), sampling, row.depth + i as u64)?;
                }
            }
            Kind::Draft => draft(engine, ids, &tokens, row.depth, &hidden)?,
        }
        // the host waits for the tokens, as it does when it generates
        engine.best()?;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// Waits for the token after each row of a step of `rows` sequences.
fn choose(engine: &mut Engine, rows: usize, sampling: &Sampling, position: u64) -> Result<(), Error> {
    if sampling.temperature == 0.0 {
        return engine.best().map(drop);
    }
    let edits = Edits::default();
    let position = u32::try_from(position).unwrap_or(u32::MAX);
    let choosing = |sequence| Some(Choosing { sampling, edits: &edits, sequence, position });
    let rows: Vec<_> = (0..rows as u32).map(|row| SampledRow { choosing: choosing(row), drafts: (0, 0) }).collect();
    engine.sample(&rows).map(drop)
}

/// A chain of as many drafts as there are tokens, after the first token and a hidden row of each sequence.
fn draft(
    engine: &mut Engine,
    ids: &[SequenceId],
    tokens: &[Vec<u32>],
    position: u64,
    hidden: &[f32],
) -> Result<(), Error> {
    let model = &engine.metadata().model;
    let (width, shortlist) = (model.hidden_size as usize, Shortlist::new(model.vocab_size as usize));
    let input = |((&sequence, tokens), hidden)| {
        let (tokens, hidden) = (&Vec::as_slice(tokens)[..1], HiddenRows::Host(hidden));
        DraftInput { sequence, position, tokens, hidden }
    };
    let inputs: Vec<_> = ids.iter().zip(tokens).zip(hidden.chunks_exact(width)).map(input).collect();
    engine.draft_ahead(&inputs, tokens[0].len(), shortlist.flags())
}

/// Bytes and FLOPs a token, of steps as the engine makes them.
fn work_per_token(cost: &Cost, row: &Row, step_tokens: u64) -> (f64, f64) {
    let (tokens, batch) = (row.tokens as f64, row.batch as f64);
    let total = tokens * batch;
    let context = row.depth as f64 + tokens / 2.0;
    let steps = match row.kind {
        Kind::Decode | Kind::Draft => tokens,
        Kind::Verify => 1.0,
        Kind::Prefill => (total / step_tokens as f64).ceil().max(1.0),
    };
    // a prompt's own keys and values count once a step, not once a token
    let bytes = steps * cost.bytes(total / steps, batch, context);
    let rows = match row.kind {
        Kind::Decode | Kind::Verify | Kind::Draft => total,
        Kind::Prefill => batch,
    };
    (bytes / total, cost.token_flops + context * cost.context_flops + rows / total * cost.row_flops)
}

fn result(row: &Row, rates: &[f64], engine: &Engine, limits: &Limits, step_tokens: u64) -> Value {
    let cost = row.kind.cost(engine);
    let (bytes, flops) = work_per_token(&cost, row, step_tokens);
    let roofline = 1.0 / (bytes / limits.read_bytes_per_s).max(flops / limits.flops_per_s);
    let median = median(rates);
    json!({
        "kind": row.kind.name(),
        "tokens": row.tokens,
        "depth": row.depth,
        "batch": row.batch,
        "tokens_per_s": median,
        "min": rates.first(),
        "max": rates.last(),
        "bytes_per_token": bytes,
        "flops_per_token": flops,
        "roofline_tokens_per_s": roofline,
        "roofline_share": median / roofline,
    })
}

/// What each kernel took since it was last asked, the longest first.
fn kernels(engine: &mut Engine) -> Value {
    let times = engine.profile(true);
    let mut named: Vec<_> = engine.metadata().kernels.iter().map(|k| k.name.as_str()).zip(times).collect();
    named.retain(|(_, t)| t.runs > 0);
    named.sort_by(|(_, a), (_, b)| b.seconds.total_cmp(&a.seconds));
    let total: f64 = named.iter().map(|(_, t)| t.seconds).sum();
    let each = |(name, t): &(&str, KernelTime)| {
        let microseconds = t.seconds / t.runs as f64 * 1e6;
        json!({
            "kernel": name,
            "runs": t.runs,
            "us_per_run": microseconds,
            "least_us": t.least_s * 1e6,
            "share": t.seconds / total,
        })
    };
    named.iter().map(each).collect()
}

fn print_head(engine: &Engine, limits: &Limits) {
    let metadata = engine.metadata();
    println!("{}  {}", metadata.model.name, engine.device());
    let (read, flops) = (limits.read_bytes_per_s / 1e9, limits.flops_per_s / 1e9);
    println!("reads {read:.1} GB/s, computes {flops:.0} GFLOP/s ({})", limits.arithmetic);
    println!(
        "{:8} {:>7} {:>7} {:>6} {:>12} {:>12} {:>12} {:>7}",
        "kind", "tokens", "depth", "batch", "tokens/s", "MB/token", "limit", "share"
    );
}

fn print_row(row: &Value) {
    let number = |key: &str| row[key].as_f64().unwrap_or(0.0);
    println!(
        "{:8} {:>7} {:>7} {:>6} {:>12.2} {:>12.2} {:>12.2} {:>6.1}%",
        row["kind"].as_str().unwrap_or_default(),
        number("tokens"),
        number("depth"),
        number("batch"),
        number("tokens_per_s"),
        number("bytes_per_token") / 1e6,
        number("roofline_tokens_per_s"),
        number("roofline_share") * 100.0
    );
    for k in row["kernels"].as_array().into_iter().flatten() {
        let number = |key: &str| k[key].as_f64().unwrap_or(0.0);
        let bar = "█".repeat((number("share") * 40.0).round() as usize);
        let name = k["kernel"].as_str().unwrap_or_default();
        println!(
            "    {name:34} {:>10.1} us, least {:>10.1} us {:>5.1}%  {bar}",
            number("us_per_run"),
            number("least_us"),
            number("share") * 100.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_reads_weights_once_a_step_and_decode_once_a_token() {
        let cost = Cost { weight_bytes: 1000.0, token_flops: 2000.0, row_flops: 100.0, ..Cost::default() };
        let row = |kind, tokens, batch| Row { kind, tokens, depth: 0, batch };
        assert_eq!(work_per_token(&cost, &row(Kind::Prefill, 100, 1), 50), (20.0, 2001.0));
        assert_eq!(work_per_token(&cost, &row(Kind::Decode, 100, 1), 50), (1000.0, 2100.0));
        assert_eq!(work_per_token(&cost, &row(Kind::Decode, 100, 4), 50), (250.0, 2100.0));
    }

    #[test]
    fn rows_that_cannot_be_measured_are_named_before_anything_runs() {
        let row = |kind| Row { kind, tokens: 30, depth: 5, batch: 1 };
        let model = Model { name: "tiny".to_owned(), max_context: 35, ..Model::default() };
        assert!(check_rows(&[row(Kind::Decode)], &model).is_ok());
        let error = check_rows(&[row(Kind::Draft)], &model).unwrap_err().to_string();
        assert!(error.contains("no multi-token prediction (MTP); leave out `--draft`"), "{error}");
        let error = check_rows(&[row(Kind::Decode)], &Model { max_context: 20, ..model }).unwrap_err().to_string();
        assert!(error.contains("5 + 30 tokens are 15 more than the context of 20"), "{error}");
    }
}
