//! The options of a chat, which are those of one prompt from a pipe too.

use clap::Parser;

use crate::generate::GenerateArgs;

/// What may be said about a chat, or about one prompt from a pipe.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ChatArgs {
    /// A system message before the first turn
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Answer without thoughts, where the model's chat template knows `enable_thinking`
    #[arg(long)]
    pub no_thinking: bool,
    /// Stop an answer after so many tokens [default: as many as the context holds; 512 from a pipe]
    #[arg(short = 'n', long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Options of `generate` that say how to choose tokens
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Threads that compute [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct SamplingArgs {
    /// 0 takes the most probable token; higher is more varied [default: the checkpoint's]
    #[arg(long, value_name = "X")]
    temperature: Option<String>,
    /// Choose among the K most probable tokens, 0 for all [default: the checkpoint's]
    #[arg(long, value_name = "K")]
    top_k: Option<String>,
    /// Choose among the fewest tokens whose probabilities sum to X [default: the checkpoint's]
    #[arg(long, value_name = "X")]
    top_p: Option<String>,
    /// Choose among tokens at least X times as probable as the most probable [default: the checkpoint's]
    #[arg(long, value_name = "X")]
    min_p: Option<String>,
    /// Make tokens of prompt and answer less probable by the factor X [default: the checkpoint's]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<String>,
    /// Seed of the random numbers [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<String>,
    /// Tokens to draft ahead of each step, a number or auto; the answers stay the same [default: auto]
    #[arg(long, value_name = "K|auto")]
    draft_tokens: Option<String>,
}

impl ChatArgs {
    /// The same as options of `generate`; wrong ones end the program as they do there.
    pub fn generate(&self, prompt: &str) -> GenerateArgs {
        #[derive(Parser)]
        struct Generate {
            #[command(flatten)]
            args: GenerateArgs,
        }
        let s = &self.sampling;
        let options = [
            ("temperature", &s.temperature),
            ("top-k", &s.top_k),
            ("top-p", &s.top_p),
            ("min-p", &s.min_p),
            ("repetition-penalty", &s.repetition_penalty),
            ("seed", &s.seed),
            ("draft-tokens", &s.draft_tokens),
        ];
        let given = options.iter().filter_map(|(name, value)| Some(format!("--{name}={}", value.as_ref()?)));
        let argv = ["generate".to_owned(), format!("--prompt={prompt}")].into_iter().chain(given);
        let mut args = Generate::parse_from(argv).args;
        args.system.clone_from(&self.system);
        args.no_thinking = self.no_thinking;
        args.threads = self.threads.map(|n| n as usize);
        args.max_new_tokens = self.max_new_tokens.unwrap_or(args.max_new_tokens);
        args
    }

    /// Most tokens of an answer.
    pub(super) fn max_answer(&self) -> usize {
        self.max_new_tokens.unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_prompt_is_taken_as_it_is() {
        for prompt in ["hello", "--json", "", "two\nlines", "-p x"] {
            assert_eq!(ChatArgs::default().generate(prompt).prompt.as_deref(), Some(prompt));
        }
    }

    #[test]
    fn options_are_handed_on() {
        #[derive(Parser)]
        struct Cli {
            #[command(flatten)]
            args: ChatArgs,
        }
        let line = ["x", "--system", "Be brief.", "--temperature", "0", "--seed", "7", "-n", "3", "--threads", "2"];
        let args = Cli::parse_from(line).args;
        let generate = args.generate("p");
        assert_eq!(generate.system.as_deref(), Some("Be brief."));
        assert_eq!((generate.seed, generate.max_new_tokens, generate.threads), (Some(7), 3, Some(2)));
        assert_eq!(generate.temperature, Some(0.0));
        assert_eq!((args.max_answer(), ChatArgs::default().max_answer()), (3, usize::MAX));
    }
}
