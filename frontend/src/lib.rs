//! From a model directory, a GGUF file, or a `config.json` alone, to the graph IR and a source of weights.
//!
//! [`load`] reads and checks everything: the configuration ([`config`]), the tensors ([`weights`]), the tokenizer's files.
//! What it gives is complete: every weight that the graph names has its rows in the checkpoint, every shape has been
//! checked, and whatever was not understood stands in [`Model::warnings`] or is an error. It executes nothing and, apart
//! from the headers, reads no weights.

use std::path::Path;

use nextc_ir::graph::ModelInfo;
use nextc_ir::{Module, Stored};

pub mod config;
mod error;
mod files;
pub mod gguf;
mod json;
pub mod layers;
pub mod tokenizer_files;
pub mod weights;

pub use config::{ModelConfig, RopeScaling};
pub use error::{ConfigProblem, Error, GgufProblem, SafetensorsProblem, WeightProblem};
pub use tokenizer_files::Asset;
pub use weights::{Checkpoint, Quant, Quantise};

const CONFIG: &str = "config.json";
const CONFIG_LIMIT_BYTES: u64 = 16 << 20;

/// What the user may ask for when a model is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The longest context, in tokens; `None`: the model's own.
    pub max_context: Option<u64>,
    /// What weights are quantised to; by default they are as the checkpoint has them.
    pub quant: Quantise,
    /// A rotary scaling in place of the configuration's.
    pub rope_scaling: Option<RopeScaling>,
    /// What KV is stored in.
    pub kv: Stored,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_context: None, quant: Quantise::default(), rope_scaling: None, kv: Stored::F32 }
    }
}

/// A model, ready to be compiled.
#[derive(Debug)]
pub struct Model {
    /// Its graph, in plain ops.
    pub module: Module,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its weights; `None` if there is only a `config.json`.
    pub source: Option<Checkpoint>,
    /// Tokenizer, chat template and generation defaults, as far as they are there.
    pub assets: Vec<Asset>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Loads a model directory, the GGUF file at `path`, or the `config.json` there alone.
/// # Errors
/// [`Error`], which names the file, what was found and what was expected.
pub fn load(path: &Path, options: &Options) -> Result<Model, Error> {
    let parts = match gguf::is_gguf(path) {
        true => open_gguf(path)?,
        false => open_folder(path)?,
    };
    let Parts { name, file, config, source, assets, mut warnings } = parts;
    let config = match &options.rope_scaling {
        Some(scaling) => config.with_rope_scaling(scaling),
        None => config,
    };
    let max_context = check_max_context(&config, options, file)?;
    let stop = tokenizer_files::stop_tokens(&assets, config.vocab_size, &mut warnings)?;
    let mut table = weights::table::build(&config, source.as_ref(), &options.quant)?;
    warnings.append(&mut table.warnings);
    let info = ModelInfo {
        name,
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        num_layers: config.layers.len() as u64,
        max_context,
        eos_token_ids: stop.unwrap_or_else(|| config.eos_token_ids.clone()),
        mtp: table.mtp.is_some(),
        has_weights: source.is_some(),
    };
    let module = layers::build_module(&config, table, info, options.kv)?;
    Ok(Model { module, config, source, assets, warnings })
}

/// What the files of a model say, each by itself.
struct Parts {
    /// The model's name.
    name: String,
    /// The file that has the configuration.
    file: String,
    config: ModelConfig,
    source: Option<Checkpoint>,
    assets: Vec<Asset>,
    warnings: Vec<String>,
}

fn open_folder(path: &Path) -> Result<Parts, Error> {
    let alone = !path.is_dir();
    let (config_path, directory) = match alone {
        true => (path.to_owned(), path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))),
        false => (path.join(CONFIG), path),
    };
    let file = files::file_name(&config_path);
    let bytes = files::read_limited(&config_path, CONFIG_LIMIT_BYTES)?.ok_or_else(|| Error::Io {
        file: config_path.display().to_string(),
        reason: std::io::Error::new(std::io::ErrorKind::NotFound, "no such file"),
    })?;
    let (config, mut warnings) = config::parse(&file, &bytes)?;
    let (source, assets) = match alone {
        true => (None, Vec::new()),
        false => open_directory(directory, &config, &mut warnings)?,
    };
    let name = weights::safetensors::directory_name(directory);
    Ok(Parts { name, file, config, source, assets, warnings })
}

fn open_directory(
    directory: &Path,
    config: &ModelConfig,
    warnings: &mut Vec<String>,
) -> Result<(Option<Checkpoint>, Vec<Asset>), Error> {
    let source = Checkpoint::open(directory, config.quantization, warnings)?;
    if source.is_none() {
        let (single, index) = (weights::safetensors::SINGLE, weights::safetensors::INDEX);
        warnings.push(format!("there is neither {single} nor {index}: the model is built from its {CONFIG} alone"));
    }
    let assets = tokenizer_files::read_assets(directory, warnings)?;
    Ok((source, assets))
}

fn open_gguf(path: &Path) -> Result<Parts, Error> {
    let file = files::file_name(path);
    let model = gguf::Gguf::open(path)?;
    let object = gguf::config::object(&model).map_err(|problem| Error::Gguf { file: file.clone(), problem })?;
    let (config, mut warnings) = config::read(&file, &object).map_err(|error| match error {
        Error::Config { file, problems } => {
            Error::Config { file, problems: problems.into_iter().map(gguf::config::own_problem).collect() }
        }
        other => other,
    })?;
    let assets = gguf::tokenizer::assets(&file, &model, &mut warnings)?;
    if config.mtp_layers.unwrap_or(0) == 0 {
        warnings.push(format!("{file}: there is no MTP module in it: nothing drafts tokens"));
    }
    Ok(Parts {
        name: gguf::source::model_name(path),
        file,
        config,
        source: Some(Checkpoint::Gguf(model)),
        assets,
        warnings,
    })
}

fn check_max_context(config: &ModelConfig, options: &Options, file: String) -> Result<u64, Error> {
    let limit = config.max_context();
    match options.max_context {
        Some(asked) if asked > limit || asked == 0 => Err(Error::MaxContext { asked, limit, file }),
        asked => Ok(asked.unwrap_or(limit)),
    }
}
