//! Turns over a model whose logits depend on every token that it was fed, in order.

use std::io::{self, Read, Write};

use serde_json::{Map, Value as Json, json};

use super::conversation::Conversation;
use super::input::{Line, Lines, Request};
use super::model::ChatModel;
use super::session::{Answer, Answering, End, MAX_SNAPSHOTS, Prompt, Session, TurnStats};
use super::{Chat, ChatError, save};
use crate::generate::decode::Decoder;
use crate::generate::draft::Planner;
use crate::generate::{Checked, Drafter, Forward, ModelError, Run, Sequence};
use crate::sample::Sampling;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Its state is a hash of the tokens so far; the next token is drawn from it.
struct Fake {
    state: u64,
    fed: Vec<u32>,
    /// Tokens fed since it was made.
    work: usize,
    vocab_size: usize,
    max_context: usize,
    fingerprint: String,
    /// Tokens that follow where the sequence has this length.
    script: (usize, Vec<u32>),
    /// Tokens that may be taken back.
    tentative: Vec<u32>,
    /// Fails once, after it has been fed so many tokens.
    fails_after: Option<usize>,
}

impl Fake {
    fn new(vocab_size: usize, max_context: usize) -> Self {
        Self {
            state: 0,
            fed: Vec::new(),
            work: 0,
            vocab_size,
            max_context,
            fingerprint: "fake".to_owned(),
            script: (0, Vec::new()),
            tentative: Vec::new(),
            fails_after: None,
        }
    }

    fn next(&self) -> u32 {
        let spared = self.vocab_size as u64 - 10;
        let scripted = self.fed.len().checked_sub(self.script.0).and_then(|i| self.script.1.get(i));
        scripted.copied().unwrap_or((self.state % spared) as u32)
    }

    /// Takes tokens; gives the next one.
    fn feed(&mut self, tokens: &[u32]) -> Result<u32, ModelError> {
        assert!(!tokens.is_empty() && self.fed.len() + tokens.len() <= self.max_context);
        self.work += tokens.len();
        for &token in tokens {
            self.fed.push(token);
            self.state = mix(self.state, token);
        }
        assert_eq!(self.state, Self::hash(&self.fed), "the state is that of the tokens");
        if self.fails_after.take_if(|most| self.work > *most).is_some() {
            return Err("no memory".into());
        }
        Ok(self.next())
    }

    fn hash(tokens: &[u32]) -> u64 {
        tokens.iter().fold(0, |state, &t| mix(state, t))
    }
}

fn mix(state: u64, token: u32) -> u64 {
    let x = (state ^ u64::from(token)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

impl Forward for Fake {
    fn max_context(&self) -> usize {
        self.max_context
    }
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }
    fn eos_token_ids(&self) -> Vec<u32> {
        Vec::new()
    }
    fn begin(&mut self) -> Result<Sequence, ModelError> {
        Ok(Sequence(0))
    }
    fn end(&mut self, _: Sequence) {}
    fn forward(&mut self, runs: &[Run<'_>]) -> Result<Vec<u32>, ModelError> {
        let [Run { sequence: Sequence(0), tokens, choosing }] = runs else { panic!("one run of the one sequence") };
        let next = self.feed(tokens)?;
        Ok(choosing.map(|_| next).into_iter().collect())
    }
    fn forward_all(&mut self, _: Run<'_>) -> Result<Option<u32>, ModelError> {
        unreachable!("a chat asks for no logits of its prompt")
    }
    fn keep_logits(&mut self) {
        unreachable!("nor of its answer")
    }
    fn logits(&self, _: usize) -> &[f32] {
        unreachable!("they are not kept")
    }
    fn drafter(&mut self) -> Option<&mut dyn Drafter> {
        Some(self)
    }
}

/// Two drafts of three are right.
impl Drafter for Fake {
    fn tentative_tokens(&self) -> usize {
        8
    }
    fn prepare(&mut self) {}
    fn speculate(&mut self, runs: &[Run<'_>], drafts: usize) -> Result<Vec<Checked>, ModelError> {
        let (fed, state) = (self.fed.clone(), self.state);
        self.tentative = runs[0].tokens.to_vec();
        let mut tokens = Vec::new();
        for i in 0..=drafts {
            let newest = self.feed(&[self.tentative[i]])?;
            tokens.push(newest);
            self.tentative.push(newest + u32::from(self.fed.len().is_multiple_of(3)));
        }
        self.tentative.truncate(drafts + 1);
        (self.fed, self.state) = (fed, state);
        let accepted = tokens.iter().zip(&self.tentative[1..]).take_while(|(chosen, draft)| chosen == draft).count();
        Ok(vec![Checked { tokens, accepted }])
    }
    fn accept(&mut self, _: Sequence, tokens: usize) -> Result<(), ModelError> {
        for &token in &std::mem::take(&mut self.tentative)[..tokens] {
            self.fed.push(token);
            self.state = mix(self.state, token);
        }
        Ok(())
    }
}

impl ChatModel for Fake {
    type Kept = (usize, u64);
    fn sequence(&self) -> Sequence {
        Sequence(0)
    }
    fn name(&self) -> &str {
        "fake"
    }
    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
    fn keep(&self) -> Result<(Self::Kept, u64), ModelError> {
        Ok(((self.fed.len(), self.state), 8))
    }
    fn go_back(&mut self, &(tokens, state): &Self::Kept) -> Result<(), ModelError> {
        assert!(tokens <= self.fed.len());
        self.fed.truncate(tokens);
        self.state = state;
        Ok(())
    }
    fn rewind(&mut self) -> Result<(), ModelError> {
        (self.state, self.fed) = (0, Vec::new());
        Ok(())
    }
    fn state_bytes(&self) -> u64 {
        8 + 4 * self.fed.len() as u64
    }
    fn write_state(&self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.state.to_le_bytes())?;
        self.fed.iter().try_for_each(|t| out.write_all(&t.to_le_bytes()))
    }
    fn read_state(&mut self, tokens: usize, input: &mut dyn Read) -> io::Result<()> {
        let mut state = [0; 8];
        input.read_exact(&mut state)?;
        self.state = u64::from_le_bytes(state);
        self.fed = (0..tokens)
            .map(|_| {
                let mut token = [0; 4];
                input.read_exact(&mut token).map(|()| u32::from_le_bytes(token))
            })
            .collect::<Result<_, _>>()?;
        Ok(())
    }
}

fn how(max_new_tokens: usize) -> Answering {
    let drafts = Planner::fixed(0);
    let decoder = Decoder { step_tokens: 3, ends: vec![95], drafts, logprobs: None, prompt_logprobs: None };
    Answering { max_new_tokens, sampling: Sampling::default(), decoder }
}

fn prompt(tokens: Vec<u32>, stable: usize) -> Prompt {
    Prompt { tokens, stable }
}

fn ask(session: &mut Session<Fake>, tokens: &[u32], stable: usize, n: usize) -> Answer {
    let go = &mut |_| Ok(std::ops::ControlFlow::Continue(()));
    session.answer(&prompt(tokens.to_vec(), stable), &mut how(n), go).unwrap()
}

/// What a new session answers to the same.
fn fresh(tokens: &[u32], n: usize) -> Vec<u32> {
    ask(&mut Session::new(Fake::new(100, 200)), tokens, 0, n).tokens
}

#[test]
fn a_turn_feeds_only_what_is_new() {
    let mut session = Session::new(Fake::new(100, 200));
    let first = ask(&mut session, &[1, 2, 3, 4, 5], 3, 4);
    assert_eq!((first.stats.fed, first.stats.reused, first.end), (5, 0, End::Length));
    assert_eq!(first.tokens, fresh(&[1, 2, 3, 4, 5], 4));
    assert_eq!(session.model().work, 5 + 3, "the last token of an answer is not fed yet");
    let next = [&[1, 2, 3, 4, 5], first.tokens.as_slice(), &[6, 7]].concat();
    let second = ask(&mut session, &next, 0, 4);
    assert_eq!((second.stats.fed, second.stats.reused), (3, 8));
    assert_eq!(second.tokens, fresh(&next, 4));
}

#[test]
fn going_back_costs_only_what_is_new_too() {
    let mut session = Session::new(Fake::new(100, 200));
    let first = ask(&mut session, &[1, 2, 3, 4, 5], 0, 4);
    let base = [&[1, 2, 3, 4, 5], first.tokens.as_slice()].concat();
    ask(&mut session, &[base.as_slice(), &[6, 7, 8]].concat(), 0, 4);
    let other = [base.as_slice(), &[9, 10]].concat();
    let third = ask(&mut session, &other, 0, 4);
    assert_eq!((third.stats.fed, third.stats.reused), (3, 8), "after the snapshot at the end of the first turn");
    assert_eq!(third.tokens, fresh(&other, 4));
    let again = ask(&mut session, &other, 0, 4);
    assert_eq!((again.tokens, again.stats.reused), (third.tokens, 8));
}

#[test]
fn answers_that_are_written_anew_go_back_to_before_them() {
    let mut session = Session::new(Fake::new(100, 200));
    let first = ask(&mut session, &[1, 2, 3, 4, 5], 3, 8);
    let shorter = [&[1, 2, 3], &first.tokens[6..], &[6]].concat();
    let second = ask(&mut session, &shorter, 0, 2);
    assert_eq!((second.stats.fed, second.stats.reused), (3, 3));
    assert_eq!(second.tokens, fresh(&shorter, 2));
    session.forget_snapshot(3);
    assert_eq!(ask(&mut session, &[1, 2, 3, 99], 0, 2).stats.reused, 0);
}

#[test]
fn drafts_change_neither_tokens_nor_state() {
    let tokens: Vec<u32> = (1..12).collect();
    for (drafts, n) in [(1, 20), (3, 20), (7, 20), (7, 4), (4, 189)] {
        let mut session = Session::new(Fake::new(100, 200));
        let mut how = how(n);
        how.decoder.drafts = Planner::fixed(drafts);
        let go = &mut |_| Ok(std::ops::ControlFlow::Continue(()));
        let answer = session.answer(&prompt(tokens.clone(), 7), &mut how, go).unwrap();
        assert_eq!(answer.tokens, fresh(&tokens, n));
        assert!(answer.stats.drafted > 0 && answer.stats.accepted < answer.stats.drafted);
        assert_eq!(session.fed(), &session.model().fed);
        let next = [tokens.as_slice(), &answer.tokens[..2], &[6]].concat();
        let second = session.answer(&prompt(next.clone(), 0), &mut Answering { max_new_tokens: 9, ..how }, go).unwrap();
        assert_eq!(second.tokens, fresh(&next, 9));
    }
}

#[test]
fn snapshots_are_bounded_and_reset_forgets() {
    let mut session = Session::new(Fake::new(100, 200));
    let mut tokens = vec![1];
    for turn in 0..MAX_SNAPSHOTS as u32 + 4 {
        tokens.extend(ask(&mut session, &tokens, 0, 2).tokens);
        tokens.push(turn);
    }
    assert_eq!(session.snapshots(), (MAX_SNAPSHOTS, 8 * MAX_SNAPSHOTS as u64));
    session.reset().unwrap();
    assert_eq!((session.snapshots(), session.fed().len()), ((0, 0), 0));
    assert_eq!(ask(&mut session, &tokens, 0, 5).tokens, fresh(&tokens, 5));
}

#[test]
fn an_interrupt_stops_prompts_and_answers_and_loses_nothing() {
    let tokens: Vec<u32> = (1..12).collect();
    for stop_at in 0..10 {
        let mut session = Session::new(Fake::new(100, 200));
        let mut calls = 0;
        let mut stop = |_| {
            calls += 1;
            Ok(if calls > stop_at { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) })
        };
        let answer = session.answer(&prompt(tokens.clone(), 7), &mut how(50), &mut stop).unwrap();
        assert_eq!(answer.end, End::Interrupted);
        let whole = fresh(&tokens, 50);
        assert!(whole.starts_with(&answer.tokens));
        assert_eq!(session.fed(), &session.model().fed);
        assert_eq!(ask(&mut session, &tokens, 7, 50).tokens, whole, "{stop_at}");
    }
}

#[test]
fn a_model_that_fails_in_a_turn_is_where_it_was_before() {
    let tokens: Vec<u32> = (1..12).collect();
    for (fails_after, drafts) in (0..30).flat_map(|n| [(n, 0), (n, 3)]) {
        let fails_after = Some(6 + fails_after);
        let mut session = Session::new(Fake { fails_after, ..Fake::new(100, 200) });
        let before = ask(&mut session, &tokens[..4], 2, 3);
        assert_eq!(session.model().work, 6);
        let next = [&tokens[..4], &before.tokens, &tokens].concat();
        let mut how = how(50);
        how.decoder.drafts = Planner::fixed(drafts);
        let go = &mut |_| Ok(std::ops::ControlFlow::Continue(()));
        let error = session.answer(&prompt(next.clone(), 9), &mut how, go).unwrap_err();
        assert_eq!(error.to_string(), "no memory");
        assert_eq!(session.fed(), &session.model().fed, "{fails_after:?}");
        assert!(session.fed().len() >= 6, "it goes back to a snapshot");
        assert_eq!(ask(&mut session, &next, 9, 50).tokens, fresh(&next, 50), "{fails_after:?}");
    }
}

#[test]
fn a_full_context_ends_answers_and_refuses_prompts() {
    let mut session = Session::new(Fake::new(100, 8));
    let answer = ask(&mut session, &[1, 2, 3, 4, 5], 0, 50);
    assert_eq!((answer.tokens.len(), answer.end), (3, End::Length));
    let go = &mut |_| Ok(std::ops::ControlFlow::Continue(()));
    let error = session.answer(&prompt((0..11).collect(), 0), &mut how(1), go).unwrap_err().to_string();
    assert!(error.contains("11 tokens, 3 more than the context of 8"), "{error}");
}

#[test]
fn a_saved_chat_goes_on_as_if_it_had_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chat");
    let mut session = Session::new(Fake::new(100, 200));
    let mut conversation = Conversation::new(Some("s".to_owned()), Map::new());
    conversation.ask("x");
    let first = ask(&mut session, &[1, 2, 3], 0, 4);
    let next = [&[1, 2, 3], first.tokens.as_slice(), &[6, 7]].concat();
    let bytes = save::save(&path, &session, &conversation, 7).unwrap();
    assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let expected = ask(&mut session, &next, 0, 9);
    let mut other = Session::new(Fake::new(100, 200));
    ask(&mut other, &[50, 51], 0, 3);
    let loaded = save::load(&path, &mut other).unwrap();
    assert_eq!((loaded.conversation, loaded.seed), (conversation, 7));
    let work = other.model().work;
    let answer = ask(&mut other, &next, 0, 9);
    assert_eq!(answer.tokens, expected.tokens);
    assert_eq!(other.model().work - work, 3 + 8, "the last token of the answer, and what is new");
}

#[test]
fn damaged_files_and_files_of_others_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chat");
    let mut session = Session::new(Fake::new(100, 200));
    ask(&mut session, &[1, 2, 3], 0, 4);
    save::save(&path, &session, &Conversation::default(), 7).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let fed = session.fed().to_vec();
    let mut check = |bytes: &[u8], expected: &str| {
        std::fs::write(&path, bytes).unwrap();
        let error = save::load(&path, &mut session).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(session.fed(), fed);
    };
    for at in [17, 24, 60, whole.len() - 40, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        check(&bytes, "damaged");
    }
    for length in [20, 40, 60, whole.len() - 1] {
        check(&whole[..length], "damaged");
    }
    check(b"", "another kind of file");
    check(b"hello, this is a text", "another kind of file");
    std::fs::write(&path, &whole).unwrap();
    let mut other = Fake::new(100, 200);
    other.fingerprint = "other".to_owned();
    let error = save::load(&path, &mut Session::new(other)).unwrap_err().to_string();
    assert!(error.contains("saved by `fake` (fingerprint fake), this is `fake` (fingerprint other)"), "{error}");
    let error = save::load(&dir.path().join("none"), &mut session).unwrap_err().to_string();
    assert!(error.contains("none: No such file"), "{error}");
    let error = save::save(&dir.path().join("no/chat"), &session, &Conversation::default(), 7).unwrap_err();
    assert!(error.to_string().contains("no/chat: No such file"), "{error}");
}

fn demo_tokenizer() -> Tokenizer {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo-model/tokenizer.json");
    Tokenizer::from_json(&std::fs::read(path).unwrap()).unwrap()
}

const PLAIN: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Drops the thoughts of earlier turns, and begins answers with thoughts.
const THINKING: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + \
    m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
    {% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}\
    {% else %}{{ '<think>\n' }}{% endif %}{% endif %}";

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_files(None, Some(source.as_bytes())).unwrap()
}

#[test]
fn tokens_that_the_model_wrote_stay_as_it_wrote_them() {
    let (tokenizer, template) = (demo_tokenizer(), template(PLAIN));
    let mut conversation = Conversation::new(None, Map::new());
    conversation.ask("Hi");
    let (first, thinking) = conversation.prompt(&template, &tokenizer).unwrap();
    let user = "<|im_start|>user\nHi<|im_end|>\n";
    assert_eq!(first.tokens, tokenizer.encode(&format!("{user}<|im_start|>assistant\n")).unwrap());
    assert_eq!((first.stable, thinking), (tokenizer.encode(user).unwrap().len(), false));
    // letter by letter, as no tokenizer would write it
    let answer: Vec<u32> = "Hello".chars().map(|c| tokenizer.encode(&c.to_string()).unwrap()[0]).collect();
    assert_ne!(tokenizer.encode("Hello").unwrap(), answer);
    conversation.answer(&answer, false, &tokenizer).unwrap();
    assert!(conversation.goes_on(&template));
    conversation.ask("Why?");
    let (second, _) = conversation.prompt(&template, &tokenizer).unwrap();
    let rest = "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n";
    let expected = [first.tokens.clone(), answer, tokenizer.encode(rest).unwrap()].concat();
    assert_eq!(second.tokens, expected);
    assert!(conversation.undo());
    conversation.ask("What?");
    let (other, _) = conversation.prompt(&template, &tokenizer).unwrap();
    assert!(other.tokens.starts_with(&expected[..first.tokens.len() + 5]));
    assert!(conversation.undo() && conversation.undo() && !conversation.undo());
}

#[test]
fn dropped_thoughts_leave_what_stands_before_them() {
    let (tokenizer, template) = (demo_tokenizer(), template(THINKING));
    assert!(template.thinking(true).is_ok() && self::template(PLAIN).thinking(true).is_err());
    let mut conversation = Conversation::new(None, Map::new());
    conversation.ask("Hi");
    let (first, thinking) = conversation.prompt(&template, &tokenizer).unwrap();
    assert!(thinking);
    conversation.answer(&tokenizer.encode("Hm.\n</think>\n\nHello").unwrap(), false, &tokenizer).unwrap();
    assert!(!conversation.goes_on(&template));
    conversation.ask("Why?");
    let (second, _) = conversation.prompt(&template, &tokenizer).unwrap();
    let text = tokenizer.decode(&second.tokens, crate::tokenizer::Special::Keep).unwrap();
    assert!(text.contains("assistant\nHello<|im_end|>") && text.ends_with("<think>\n"), "{text}");
    assert!(second.tokens.starts_with(&first.tokens[..first.stable]));
    let off = Map::from_iter([("enable_thinking".to_owned(), Json::Bool(false))]);
    let mut conversation = Conversation::new(None, off);
    conversation.ask("Hi");
    assert!(!conversation.prompt(&template, &tokenizer).unwrap().1);
}

/// What a chat has printed.
#[derive(Clone, Default)]
struct Screen(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Screen {
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }
}

struct Typed(Vec<Line>);

impl Lines for Typed {
    fn line(&mut self, _: &str) -> Result<Line, ChatError> {
        Ok(if self.0.is_empty() { Line::End } else { self.0.remove(0) })
    }
    fn remember(&mut self, _: &str) {}
}

fn chat<'a>(tokenizer: &'a Tokenizer, source: &str, screen: &Screen) -> Chat<'a, Fake> {
    let mut answering = how(6);
    (answering.decoder.step_tokens, answering.decoder.ends) = (64, vec![8191]);
    Chat {
        session: Session::new(Fake::new(8192, 4000)),
        conversation: Conversation::new(None, Map::new()),
        template: template(source),
        tokenizer,
        answering,
        last: TurnStats::default(),
        dim: true,
        out: Box::new(screen.clone()),
    }
}

fn say(chat: &mut Chat<'_, Fake>, screen: &Screen, message: &str) -> String {
    assert!(chat.obey(Request::of(message)).unwrap().is_continue());
    screen.take()
}

#[test]
fn commands_do_what_they_say() {
    let (tokenizer, screen) = (demo_tokenizer(), Screen::default());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("my chat").display().to_string();
    let mut chat = chat(&tokenizer, PLAIN, &screen);
    let say = |chat: &mut _, message: &str| say(chat, &screen, message);
    assert_eq!(say(&mut chat, "/undo"), "nothing to take back\n");
    let first = say(&mut chat, "Hi");
    let before = chat.session.fed().len();
    let second = say(&mut chat, "Why?");
    assert!(say(&mut chat, "/stats").contains(" fed, "));
    assert_eq!(chat.last.reused, chat.conversation_before_last());
    assert_eq!(say(&mut chat, "/undo"), "took back a turn; 1 turn left\n");
    assert_eq!(chat.session.fed().len(), before, "the state is that of the first turn");
    assert_eq!(say(&mut chat, "Why?"), second, "as if it had not been asked before");
    assert!(say(&mut chat, &format!("/save {path}")).starts_with("saved 2 turns, "));
    let third = say(&mut chat, "And?");
    assert_eq!(say(&mut chat, "/reset"), "forgot everything\n");
    assert_eq!(say(&mut chat, "Hi"), first);
    assert!(say(&mut chat, &format!("/load {path}")).starts_with("loaded 2 turns, "));
    assert_eq!(say(&mut chat, "And?"), third);
    assert!(say(&mut chat, "/load /nonexistent").starts_with("error: /nonexistent: "));
    assert!(say(&mut chat, "/system Be brief.").contains("reads the whole chat again"));
    assert_eq!(say(&mut chat, "/system"), "Be brief.\n");
    say(&mut chat, "And?");
    assert_eq!(chat.last.reused, 0);
    assert!(say(&mut chat, "/help").contains("/undo"));
    assert!(chat.obey(Request::Quit).unwrap().is_break());
}

impl Chat<'_, Fake> {
    /// Tokens that the sequence had when the last turn began.
    fn conversation_before_last(&self) -> usize {
        self.session.fed().len() + 1 - self.last.answer - self.last.fed
    }
}

#[test]
fn thoughts_are_dimmed_and_not_kept() {
    let (tokenizer, screen) = (demo_tokenizer(), Screen::default());
    let mut chat = chat(&tokenizer, THINKING, &screen);
    chat.answering.max_new_tokens = 100;
    let prompt = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n").unwrap();
    let answer = [tokenizer.encode("Hm.</think>Hello").unwrap(), vec![8191]].concat();
    chat.session = Session::new(Fake { script: (prompt.len(), answer), ..Fake::new(8192, 4000) });
    assert_eq!(say(&mut chat, &screen, "Hi"), "\x1b[2mHm.\x1b[0mHello\n");
    assert_eq!(chat.conversation.messages[1], json!({"role": "assistant", "content": "Hm.</think>Hello"}));
    say(&mut chat, &screen, "Why?");
    let user = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n").unwrap().len();
    assert_eq!(chat.last.reused, user, "goes back to before the thoughts, and not to the beginning");
}

#[test]
fn two_interrupts_or_the_end_of_input_end_the_chat() {
    let (tokenizer, screen) = (demo_tokenizer(), Screen::default());
    let text = |t: &str| Line::Text(t.to_owned());
    let run = |lines: Vec<Line>| {
        let mut typed = Typed(lines);
        chat(&tokenizer, PLAIN, &screen).converse(&mut typed).unwrap();
        (typed.0.len(), screen.take())
    };
    assert_eq!(run(vec![Line::Interrupted, Line::Interrupted, text("x")]).0, 1);
    assert_eq!(run(vec![Line::Interrupted, text(""), Line::Interrupted, text("/nonsense"), Line::End, text("x")]).0, 1);
    assert_eq!(run(vec![text("/quit"), text("x")]), (1, String::new()));
}

#[test]
fn a_turn_that_fails_is_taken_back() {
    let (tokenizer, screen) = (demo_tokenizer(), Screen::default());
    let mut chat = chat(&tokenizer, PLAIN, &screen);
    chat.session = Session::new(Fake::new(8192, 30));
    let long = "word ".repeat(40);
    assert!(say(&mut chat, &screen, &long).contains("more than the context of 30; `/undo`, or `/reset`"));
    assert_eq!(chat.turns(), 0);
    assert!(!say(&mut chat, &screen, "Hi").contains("error"));
    assert_eq!(chat.turns(), 1);
}
