//! The whole path, in one place: folder -> graph -> passes -> kernels -> machine code -> executable.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nextc_frontend::{Model, Options};
use nextc_ir::schedule::KernelModule;
use nextc_ir::target::Activations as Rounding;
use nextc_ir::{Module, Stored, Target, WeightSource};
use nextc_link::{LinkInputs, Report};
use nextc_passes::lower::lower;
use nextc_passes::{legalise, run_all};

use crate::cli::{Activations, Backend, Kv, ModelArgs, TargetKind};
use crate::ptxas::{Assembled, Ptxas};
use crate::show;

/// What code is made for, and by what.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The machine; the best of those that are named.
    pub target: Target,
    /// The others, the best first.
    pub others: Vec<Target>,
    /// The backend.
    pub backend: Backend,
    /// What KV is stored in.
    pub kv: Stored,
    /// What assembles PTX.
    pub ptxas: Ptxas,
    /// Whether activations are rounded to what is fastest, which depends on the weights too.
    is_auto: bool,
}

impl Plan {
    /// From the command line; `backend` is the one to use where the command line names none.
    /// # Errors
    /// Names the first option that asks for something that is not there.
    pub fn new(args: &ModelArgs, backend: Option<Backend>) -> anyhow::Result<Self> {
        refuse_what_is_missing(args)?;
        let backend = args.backend.or(backend).unwrap_or(default_backend());
        if backend == Backend::Llvm && !cfg!(feature = "llvm") {
            bail!(
                "this nextc was built without LLVM; use `--backend cranelift`, or build nextc with `--features llvm`"
            );
        }
        let mut targets = targets(args, backend)?;
        let is_auto = args.activations == Activations::Auto;
        let target = targets.remove(0);
        Ok(Self { target, others: targets, backend, kv: kv(args), ptxas: args.ptxas.clone(), is_auto })
    }

    /// Its backend's name.
    pub fn backend_name(&self) -> &'static str {
        match self.backend {
            Backend::Llvm => "llvm",
            Backend::Cranelift => "cranelift",
        }
    }
}

/// The machines that the command line names, the best first: at least one.
fn targets(args: &ModelArgs, backend: Backend) -> anyhow::Result<Vec<Target>> {
    if args.target == TargetKind::Cuda {
        if backend != Backend::Llvm {
            bail!("`--target cuda`: only the LLVM backend makes PTX; use `--backend llvm`");
        }
        let gpu = Target::gpu(args.gpu.as_deref().unwrap_or(nextc_ir::target::GPUS[0].name));
        return Ok(vec![gpu.context("--gpu")?]);
    }
    let mut targets = args.cpu.split(',').map(Target::named).collect::<Result<Vec<_>, _>>().context("--cpu")?;
    targets.sort_by_key(|target| std::cmp::Reverse((target.vector_bits, target.features.len())));
    targets.dedup_by(|a, b| a.features == b.features);
    if backend == Backend::Cranelift {
        // its code is the same for all of them
        targets = targets.pop().into_iter().map(Target::for_cranelift).collect();
    }
    let rounds = |target| Ok(Target { activations: activations(args.activations, &target)?, ..target });
    targets.into_iter().map(rounds).collect()
}

/// What activations are rounded to: what is fastest, unless something else is asked for.
fn activations(wanted: Activations, target: &Target) -> anyhow::Result<Rounding> {
    match wanted {
        Activations::Auto | Activations::Bf16 if target.has_tiles() => Ok(Rounding::Bf16),
        Activations::Auto | Activations::Int8 if target.has_byte_dots() => Ok(Rounding::Int8),
        Activations::Bf16 if target.has_pair_dots() => Ok(Rounding::Bf16),
        Activations::Auto | Activations::Int16 if target.has_short_dots() => Ok(Rounding::Int16),
        Activations::Auto | Activations::F32 => Ok(Rounding::F32),
        Activations::Bf16 => bail!(
            "`--activations bf16`: `{}` has no fast products of bfloat16 that the backend uses (AMX or AVX-512 BF16, through LLVM); expected `auto` or `f32`",
            target.cpu
        ),
        Activations::Int8 => bail!(
            "`--activations int8`: `{}` has no vectors of 512 bits that multiply bytes (AVX-512 VNNI, through LLVM); expected `auto` or `f32`",
            target.cpu
        ),
        Activations::Int16 => bail!(
            "`--activations int16`: the backend uses vectors of {} bits for `{}`, where int16 would be no faster; expected `auto` or `f32`",
            target.vector_bits,
            target.cpu
        ),
    }
}

/// What KV is stored in. `auto` takes bf16, as memory is what long contexts wait for, unless activations are to stay in float32.
fn kv(args: &ModelArgs) -> Stored {
    match args.kv {
        Kv::F32 => Stored::F32,
        Kv::Bf16 => Stored::Bf16,
        Kv::Int8 => Stored::Int8,
        Kv::Fp8 => Stored::Fp8,
        Kv::Auto if args.activations == Activations::F32 => Stored::F32,
        Kv::Auto => Stored::Bf16,
    }
}

/// LLVM where it is compiled in.
pub const fn default_backend() -> Backend {
    if cfg!(feature = "llvm") { Backend::Llvm } else { Backend::Cranelift }
}

fn refuse_what_is_missing(args: &ModelArgs) -> anyhow::Result<()> {
    if args.target == TargetKind::CpuCuda {
        bail!("`--target cpu+cuda`: one executable for both is not there yet, expected `cpu` or `cuda`");
    }
    if let Some(gpu) = args.gpu.as_ref().filter(|_| args.target == TargetKind::Cpu) {
        bail!("`--gpu {gpu}` names a GPU for `--target cpu`; use `--target cuda`");
    }
    if args.target == TargetKind::Cuda && args.activations != Activations::Auto {
        bail!("`--activations`: a GPU multiplies rows of 16-bit floats, or sums of two of them; expected `auto`");
    }
    Ok(())
}

fn options(args: &ModelArgs, kv: Stored) -> Options {
    let ModelArgs { max_context, ref quant, ref rope_scaling, .. } = *args;
    Options { max_context, quant: quant.clone(), rope_scaling: rope_scaling.clone(), kv }
}

/// Reads and checks a model whose KV is stored as `kv`, and shows what its user should know.
/// # Errors
/// What is wrong with its files.
pub fn load(args: &ModelArgs, kv: Stored) -> anyhow::Result<Model> {
    show::progress(&format!("reading {}", args.model.display()));
    let model = nextc_frontend::load(&args.model, &options(args, kv))?;
    model.warnings.iter().for_each(|warning| show::warn(warning));
    Ok(model)
}

/// The target with what the model adds to it.
pub fn target_of(plan: &Plan, model: &Model) -> Target {
    with_model(&plan.target, &model.module, plan.is_auto)
}

fn with_model(target: &Target, module: &Module, is_auto: bool) -> Target {
    // integers are multiplied with weights of integers only
    let activations = match target.activations {
        Rounding::Int8 | Rounding::Int16 if !module.weights.values().any(|w| w.format.is_bytes()) => {
            if is_auto && target.has_pair_dots() { Rounding::Bf16 } else { Rounding::F32 }
        }
        activations => activations,
    };
    Target { max_context: module.info.max_context, activations, ..target.clone() }
}

/// The graph after all passes.
/// # Errors
/// The pass that failed, and why.
pub fn fuse(graph: Module, target: &Target) -> anyhow::Result<Module> {
    show::progress("fusing");
    Ok(run_all(graph, target)?)
}

/// Kernels that the backend can take.
/// # Errors
/// What cannot be lowered.
pub fn lower_to_kernels(fused: &Module, target: &Target) -> anyhow::Result<KernelModule> {
    Ok(legalise::legalise(lower(fused, target)?, target)?)
}

/// Objects with the machine code of every kernel.
/// # Errors
/// What the backend does not take.
fn emit(kernels: &KernelModule, plan: &Plan, target: &Target) -> anyhow::Result<Vec<Vec<u8>>> {
    let (count, backend, cpu) = (kernels.kernels.len(), plan.backend_name(), &target.cpu);
    let of_several = if plan.others.is_empty() { String::new() } else { format!(" for {cpu}") };
    show::progress(&format!("compiling {count} kernels{of_several} with {backend}"));
    match plan.backend {
        Backend::Cranelift => Ok(vec![nextc_cranelift::compile(kernels, target)?]),
        #[cfg(feature = "llvm")]
        Backend::Llvm => Ok(nextc_llvm::compile(kernels, target)?),
        #[cfg(not(feature = "llvm"))]
        Backend::Llvm => bail!("this nextc was built without LLVM"),
    }
}

/// Binaries for a GPU of the kernels' texts; none for a CPU, or if the driver is to compile them.
/// # Errors
/// What an assembler that was named says.
fn assemble(texts: &[Vec<u8>], plan: &Plan, target: &Target) -> anyhow::Result<Vec<Vec<u8>>> {
    let Some(gpu) = target.gpu else { return Ok(Vec::new()) };
    show::progress(&format!("assembling {} kernels with ptxas", texts.len()));
    Ok(match plan.ptxas.assemble(gpu.name, texts)? {
        Assembled::Binaries(binaries) => binaries,
        Assembled::Texts(reason) => {
            show::progress(&format!(
                "no binaries for {}, so its driver compiles the kernels at the first start: {reason}",
                gpu.name
            ));
            Vec::new()
        }
    })
}

/// Compiles a model to an executable.
/// # Errors
/// Whatever went wrong; then there is no output file.
pub fn build(args: &ModelArgs, output: Option<&Path>) -> anyhow::Result<(Report, Module)> {
    let plan = Plan::new(args, None)?;
    let Model { module, source, assets, .. } = load(args, plan.kv)?;
    let assets: Vec<_> = assets.into_iter().map(|asset| (asset.name, asset.bytes)).collect();
    let default_output = PathBuf::from(&module.info.name);
    let source = source.as_ref().map(|source| source as &dyn WeightSource);
    link(&plan, &module, source, &assets, (output.unwrap_or(&default_output), args.embed_weights))
}

/// Compiles a model to an executable without weights, which measures the speed of its kernels with made-up ones.
/// # Errors
/// As [`build`].
pub fn build_without_weights(plan: &Plan, mut module: Module, output: &Path) -> anyhow::Result<()> {
    module.info.has_weights = false;
    link(plan, &module, None, &[], (output, false)).map(|_| ())
}

/// Compiles a module for all machines of a plan, and writes the executable.
fn link(
    plan: &Plan,
    module: &Module,
    source: Option<&dyn WeightSource>,
    assets: &[(String, Vec<u8>)],
    (output, embed_weights): (&Path, bool),
) -> anyhow::Result<(Report, Module)> {
    let mut compiled = Vec::new();
    for target in std::iter::once(&plan.target).chain(&plan.others) {
        let target = with_model(target, module, plan.is_auto);
        let fused = fuse(module.clone(), &target)?;
        let kernels = lower_to_kernels(&fused, &target)?;
        let objects = emit(&kernels, plan, &target)?;
        let binaries = assemble(&objects, plan, &target)?;
        compiled.push((target, fused, kernels, objects, binaries));
    }
    let versions: Vec<_> = compiled
        .iter()
        .map(|(target, graph, module, objects, binaries)| nextc_link::Version {
            objects,
            binaries,
            module,
            graph: Some(graph),
            target,
        })
        .collect();
    let report = nextc_link::link(&LinkInputs {
        versions: &versions,
        backend: plan.backend_name(),
        compiler: env!("CARGO_PKG_VERSION"),
        source,
        assets,
        output,
        embed_weights,
        progress: true,
    })?;
    let (_, fused, ..) = compiled.swap_remove(0);
    Ok((report, fused))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    #[cfg(feature = "llvm")]
    use nextc_ir::format::{Blocks, Format};

    fn plan(options: &str) -> anyhow::Result<Plan> {
        let line = format!("nextc build model {options}");
        match Cli::try_parse_from(line.split_whitespace()).expect("the options exist").command {
            Command::Build(args) => Plan::new(&args.model, None),
            other => panic!("{other:?} is not build"),
        }
    }

    #[test]
    fn what_is_not_there_yet_is_refused_by_name() {
        for (options, expected) in [
            ("--target cpu+cuda", "`--target cpu+cuda`"),
            ("--target cuda --backend cranelift", "`--target cuda`"),
            ("--target cuda --backend llvm --activations f32", "`--activations`"),
            ("--gpu sm_90a", "`--gpu sm_90a`"),
            ("--backend cranelift --activations int8", "`--activations int8`"),
            ("--backend cranelift --activations bf16", "`--activations bf16`"),
            ("--cpu pentium", "`pentium` is unknown"),
        ] {
            let error = format!("{:#}", plan(options).expect_err(expected));
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn of_several_cpus_the_best_comes_first_and_cranelift_has_one_code_for_all() {
        let cpus = |options: &str| -> Vec<String> {
            let plan = plan(options).expect("they are known");
            std::iter::once(plan.target).chain(plan.others).map(|target| target.cpu).collect()
        };
        let named = "--cpu haswell,x86-64-v3,sapphirerapids,x86-64-v4";
        assert_eq!(cpus(&format!("{named} --backend cranelift")), ["haswell"]);
        if cfg!(feature = "llvm") {
            assert_eq!(cpus(&format!("{named} --backend llvm")), ["sapphirerapids", "x86-64-v4", "haswell"]);
        }
        let error = plan("--cpu x86-64-v3,,").expect_err("one has no name");
        assert!(format!("{error:#}").contains("cpu `` is unknown"), "{error:#}");
    }

    #[test]
    #[cfg(feature = "llvm")]
    fn activations_are_rounded_where_a_matrix_unit_multiplies_them() {
        let of = |options: &str| plan(options).expect(options).target.activations;
        assert_eq!(of("--cpu sapphirerapids"), Rounding::Bf16);
        assert_eq!(of("--cpu sapphirerapids --activations bf16"), Rounding::Bf16);
        assert_eq!(of("--cpu sapphirerapids --activations f32"), Rounding::F32);
        assert_eq!(of("--cpu x86-64-v4"), Rounding::F32);
        assert!(plan("--cpu x86-64-v4 --activations bf16").is_err());
        let several = plan("--cpu x86-64-v4,sapphirerapids").expect("they are known");
        assert_eq!((several.target.activations, several.others[0].activations), (Rounding::Bf16, Rounding::F32));
        assert!(plan("--cpu x86-64-v4,sapphirerapids --activations bf16").is_err());
    }

    #[test]
    #[cfg(feature = "llvm")]
    fn activations_are_rounded_to_bytes_where_vectors_multiply_them_and_weights_are_bytes() {
        let of = |options: &str| plan(options).expect(options).target.activations;
        assert_eq!(of("--cpu icelake-server"), Rounding::Int8);
        assert_eq!(of("--cpu icelake-server --activations int8"), Rounding::Int8);
        assert_eq!(of("--cpu icelake-server --activations f32"), Rounding::F32);
        assert_eq!(of("--cpu sapphirerapids --activations int8"), Rounding::Int8);
        let error = plan("--cpu x86-64-v4 --activations int8").expect_err("it has no VNNI").to_string();
        assert!(error.contains("`x86-64-v4`") && error.contains("expected `auto` or `f32`"), "{error}");
        let several = plan("--cpu x86-64-v3,znver4,sapphirerapids").expect("they are known");
        let others: Vec<Rounding> = several.others.iter().map(|target| target.activations).collect();
        assert_eq!((several.target.activations, others), (Rounding::Bf16, vec![Rounding::Int8, Rounding::Int16]));

        let target = plan("--cpu znver4").expect("it is known").target;
        let with_weight = |target: &Target, format| {
            let origin = nextc_ir::graph::Origin::Values(Vec::new());
            let weight = nextc_ir::graph::WeightDecl { shape: vec![16, 64], in_rank: 1, format, origin };
            let weights = [("w".to_owned(), weight)].into_iter().collect();
            with_model(target, &Module { weights, ..Module::default() }, true)
        };
        let with = |format| with_weight(&target, format);
        let q4 = Format::Q4(Blocks::group(32));
        assert_eq!([with(q4), with(Format::Bf16)].map(|t| t.activations), [Rounding::Int8, Rounding::Bf16]);
        let older = plan("--cpu icelake-server").expect("it is known").target;
        assert_eq!(with_weight(&older, Format::Bf16).activations, Rounding::F32);
        assert_eq!(of("--cpu znver4 --activations bf16"), Rounding::Bf16);
        let narrow = plan("--cpu x86-64-v3").expect("it is known").target;
        let with_narrow = |format| with_weight(&narrow, format).activations;
        assert_eq!([with_narrow(q4), with_narrow(Format::Bf16)], [Rounding::Int16, Rounding::F32]);
        assert!(with(q4).required_features().contains(&"avx512vnni"));
        assert!(!with(Format::Bf16).required_features().contains(&"avx512vnni"));
    }

    #[test]
    fn activations_are_rounded_to_16_bits_where_vectors_are_narrow() {
        let of = |options: &str| plan(options).expect(options).target.activations;
        assert_eq!(of("--cpu sapphirerapids --backend cranelift"), Rounding::Int16);
        assert_eq!(of("--cpu x86-64-v3 --backend cranelift --activations int16"), Rounding::Int16);
        assert_eq!(of("--cpu x86-64-v3 --backend cranelift --activations f32"), Rounding::F32);
        if cfg!(feature = "llvm") {
            assert_eq!(of("--cpu x86-64-v3 --backend llvm"), Rounding::Int16);
            let error = plan("--cpu x86-64-v4 --backend llvm --activations int16").expect_err("it is wide").to_string();
            assert!(error.contains("512 bits for `x86-64-v4`"), "{error}");
        }
    }

    #[test]
    fn kv_is_what_is_asked_for_or_what_the_target_waits_for() {
        let of = |options: &str| plan(options).expect(options).kv;
        assert_eq!([of(""), of("--kv f32"), of("--kv int8")], [Stored::Bf16, Stored::F32, Stored::Int8]);
        assert_eq!([of("--activations f32"), of("--activations f32 --kv fp8")], [Stored::F32, Stored::Fp8]);
        if cfg!(feature = "llvm") {
            assert_eq!([of("--target cuda"), of("--target cuda --kv f32")], [Stored::Bf16, Stored::F32]);
        }
    }

    #[test]
    fn cranelift_narrows_the_target() {
        assert_eq!(plan("--backend cranelift").expect("it is always there").target.vector_bits, 128);
        assert_eq!(plan("--backend llvm").is_ok(), cfg!(feature = "llvm"));
        assert_eq!(plan("--activations f32 --quant keep").expect("it is what is there").backend, default_backend());
    }
}
