//! What is printed: text as it comes, blocks of text, or JSON.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::ControlFlow;

use serde_json::{Value as Json, json};

use super::batch::{Timings, Watch};
use super::decode::{Completion, Finish};
use super::requests::{Form, Request, Requests};
use super::stop::StopTexts;
use super::{GenerateArgs, GenerateError, TextFiles};
use crate::sample::logprobs::{Logprob, Logprobs};
use crate::tokenizer::{LazyTokenizer, Special, TextStream, Tokenizer, TokenizerError};

/// Prints what comes of requests, and watches for stop texts.
pub struct Output<'a> {
    requests: &'a Requests,
    tokenizer: &'a LazyTokenizer<'a>,
    out: &'a mut dyn Write,
    json: bool,
    load_s: f64,
    streams: Vec<Stream<'a>>,
    /// What has ended and is not printed yet, because one before it has not ended, or because all are printed together.
    ended: BTreeMap<usize, Completion>,
    /// How many are printed.
    printed: usize,
    /// Tokens of all answers, and how many of them ended by themselves.
    totals: (usize, usize),
}

/// The text of an answer as its tokens come.
struct Stream<'a> {
    /// None where there is no tokenizer, or no text is wanted yet.
    text: Option<TextStream<'a>>,
    stops: StopTexts,
    /// All text so far, without a stop text.
    complete: String,
}

impl<'a> Output<'a> {
    /// The tokenizer is read only if text is printed or watched.
    /// # Errors
    /// [`GenerateError`] if it is needed and cannot be had.
    pub fn new(
        args: &GenerateArgs,
        files: &'a TextFiles<'_>,
        requests: &'a Requests,
        load_s: f64,
        out: &'a mut dyn Write,
    ) -> Result<Self, GenerateError> {
        let stops = requests.list.iter().any(|r| !r.stops.is_empty());
        let wanted = stops || (!args.json && files.tokenizer.is_present());
        let tokenizer: Option<&'a Tokenizer> = if wanted { Some(files.tokenizer.get()?) } else { None };
        let stream = |request: &Request| Stream {
            text: tokenizer.map(|t| TextStream::new(t, request.special)),
            stops: StopTexts::new(&request.stops),
            complete: String::new(),
        };
        let streams = requests.list.iter().map(stream).collect();
        Ok(Self {
            requests,
            tokenizer: &files.tokenizer,
            out,
            json: args.json,
            load_s,
            streams,
            ended: BTreeMap::new(),
            printed: 0,
            totals: (0, 0),
        })
    }

    /// Text is printed while it comes: one sequence, and no JSON.
    fn is_live(&self) -> bool {
        !self.json && self.requests.form == Form::One
    }

    /// Prints the rest, after all have ended.
    /// # Errors
    /// [`GenerateError`] if there is no text for tokens, or it cannot be written.
    pub fn finish(mut self, timings: &Timings) -> Result<(), GenerateError> {
        if self.json && self.requests.form != Form::Lines {
            let all = std::mem::take(&mut self.ended);
            let mut objects = all.iter().map(|(&i, c)| self.object(i, c)).collect::<Result<Vec<_>, _>>()?;
            let whole = match self.requests.form {
                Form::One => objects.pop().unwrap_or(Json::Null),
                _ => json!({"sequences": objects}),
            };
            print(self.out, &format!("{whole}\n")).map(drop)?;
        }
        if !self.json {
            eprintln!("{}", self.speed(timings));
        }
        Ok(())
    }

    /// What is printed of an answer once it has ended and those before it are printed.
    fn answer(&mut self, i: usize, completion: &Completion) -> Result<String, GenerateError> {
        if self.json {
            return Ok(format!("{}\n", self.object(i, completion)?));
        }
        let text = std::mem::take(&mut self.streams[i].complete);
        Ok(match self.requests.form {
            Form::One => "\n".to_owned(),
            Form::Array => format!("[{i}] {text}\n"),
            Form::Lines => format!("{}== {} ==\n{text}\n", if i > 0 { "\n" } else { "" }, self.requests.list[i].at),
        })
    }

    /// The text of an answer; none without a tokenizer.
    fn text(&self, request: &Request, completion: &Completion) -> Result<Option<String>, TokenizerError> {
        if !self.tokenizer.is_present() {
            return Ok(None);
        }
        let text = self.tokenizer.get()?.decode(completion.without_end(), request.special)?;
        Ok(Some(StopTexts::new(&request.stops).finish(&text)))
    }

    fn object(&self, i: usize, completion: &Completion) -> Result<Json, GenerateError> {
        let request = &self.requests.list[i];
        let mut object = json!({
            "tokens": completion.tokens,
            "text": self.text(request, completion)?,
            "finish_reason": completion.finish.name(),
            "prompt_tokens": request.tokens.len(),
            "completion_tokens": completion.tokens.len(),
            "timings": {
                "prefill_tokens_per_s": completion.prefill_tokens_per_s(),
                "decode_tokens_per_s": completion.decode_tokens_per_s(),
                "load_s": self.load_s,
            },
            "mtp": {"drafted": completion.drafted, "accepted": completion.accepted},
            "seed": request.sampling.seed,
        });
        if let Some(all) = &completion.logprobs {
            object["logprobs"] = all.iter().map(|l| self.logprobs(l)).collect::<Result<_, _>>()?;
        }
        if let Some(all) = &completion.prompt_logprobs {
            let one = |l: &Option<Logprobs>| l.as_ref().map_or(Ok(Json::Null), |l| self.logprobs(l));
            object["prompt_logprobs"] = all.iter().map(one).collect::<Result<_, _>>()?;
        }
        Ok(object)
    }

    fn logprobs(&self, logprobs: &Logprobs) -> Result<Json, TokenizerError> {
        let mut object = self.logprob(&logprobs.token)?;
        object["top"] = logprobs.top.iter().map(|l| self.logprob(l)).collect::<Result<_, _>>()?;
        Ok(object)
    }

    fn logprob(&self, logprob: &Logprob) -> Result<Json, TokenizerError> {
        let text = match self.tokenizer.is_present() {
            true => Some(self.tokenizer.get()?.decode(&[logprob.token], Special::Keep)?),
            false => None,
        };
        Ok(json!({"token": logprob.token, "text": text, "logprob": logprob.logprob}))
    }

    fn speed(&self, t: &Timings) -> String {
        let (tokens, ended) = self.totals;
        let seed = self.requests.list.first().map_or(0, |r| r.sampling.seed);
        format!(
            "loaded in {:.3} s | prompt: {} tokens, {:.1} tokens/s | answer: {tokens} tokens, {:.1} tokens/s | {ended} of {} ended by itself | seed {seed}",
            self.load_s,
            t.prefill_tokens,
            t.prefill_tokens_per_s(),
            t.decode_tokens_per_s(),
            self.requests.list.len(),
        )
    }
}

impl Watch for Output<'_> {
    fn token(&mut self, i: usize, token: u32) -> Result<ControlFlow<()>, GenerateError> {
        let live = self.is_live();
        let stream = &mut self.streams[i];
        let (text, flow) = match &mut stream.text {
            Some(text) => stream.stops.push(&text.push(token)),
            None => (format!("{token} "), ControlFlow::Continue(())),
        };
        if live {
            return print(self.out, &text).map(|printed| if printed.is_break() { printed } else { flow });
        }
        stream.complete.push_str(&text);
        Ok(flow)
    }

    fn done(&mut self, i: usize, completion: Completion) -> Result<(), GenerateError> {
        let stream = &mut self.streams[i];
        if let (Some(text), false) = (&mut stream.text, completion.ended_by_watch) {
            let rest = stream.stops.finish(&text.finish());
            match self.is_live() {
                true => print(self.out, &rest).map(drop)?,
                false => self.streams[i].complete.push_str(&rest),
            }
        }
        self.totals.0 += completion.tokens.len();
        self.totals.1 += usize::from(completion.finish == Finish::Stop);
        self.ended.insert(i, completion);
        while !self.json || self.requests.form == Form::Lines {
            let Some(completion) = self.ended.remove(&self.printed) else { break };
            let answer = self.answer(self.printed, &completion)?;
            self.printed += 1;
            if print(self.out, &answer)?.is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// Prints at once; a reader that has gone away ends generation without an error.
fn print(out: &mut dyn Write, text: &str) -> Result<ControlFlow<()>, GenerateError> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(e) => Err(e.into()),
    }
}
