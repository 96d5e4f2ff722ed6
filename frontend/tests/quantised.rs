//! Quantised tensors: what they stand for, and what is wrong with damaged and hostile ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nextc_frontend::{Model, Options, Quant, Quantise, load};
use nextc_ir::WeightSource;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The tensors of a checkpoint: name to dtype, shape and bytes.
type Tensors = BTreeMap<String, (String, Vec<u64>, Vec<u8>)>;

/// A projection that every fixture has quantised.
const UP: &str = "model.layers.0.mlp.shared_expert.up_proj";

struct Fixture {
    config: Value,
    tensors: Tensors,
}

impl Fixture {
    fn read(name: &str) -> Self {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracle")).join(name);
        let config = fs::read(dir.join("config.json")).expect("the fixture is there");
        let bytes = fs::read(dir.join("model.safetensors")).expect("the fixture is there");
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + header_bytes]).expect("JSON");
        let tensor = |(name, entry): (&String, &Value)| {
            let numbers = |key: &str| -> Vec<u64> {
                entry[key].as_array().expect("a list").iter().map(|n| n.as_u64().expect("a number")).collect()
            };
            let at = numbers("data_offsets");
            let data = bytes[8 + header_bytes..][at[0] as usize..at[1] as usize].to_vec();
            (name.clone(), (entry["dtype"].as_str().expect("a name").to_owned(), numbers("shape"), data))
        };
        let tensors = header.iter().filter(|(n, _)| *n != "__metadata__").map(tensor).collect();
        Self { config: serde_json::from_slice(&config).expect("JSON"), tensors }
    }

    fn part(&mut self, part: &str) -> &mut (String, Vec<u64>, Vec<u8>) {
        self.tensors.get_mut(&format!("{UP}.{part}")).unwrap_or_else(|| panic!("no {part}"))
    }

    fn load(&self, quant: impl Into<Quantise>) -> (TempDir, Result<Model, nextc_frontend::Error>) {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let begin = data.len();
            data.extend_from_slice(bytes);
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]}));
        }
        let header = Value::Object(header).to_string();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join("config.json"), self.config.to_string()).expect("written");
        fs::write(dir.path().join("model.safetensors"), file).expect("written");
        let model = load(dir.path(), &Options { quant: quant.into(), ..Options::default() });
        (dir, model)
    }

    /// Loading says exactly this, about the projection.
    fn refuse(&self, expected: &str) {
        let (_dir, model) = self.load(Quantise::default());
        let expected = format!("checkpoint: tensor `{UP}.{expected}");
        assert_eq!(model.expect_err(&expected).to_string(), expected);
    }

    /// Loading goes well, and reading says this.
    fn refuse_reading(&self, expected: &str) {
        let (_dir, model) = self.load(Quantise::default());
        let model = model.expect("it loads");
        let mut row = vec![0.0; self.columns()];
        let source = model.source.as_ref().expect("there are weights");
        let error = source.read_rows(&format!("{UP}.weight"), 1, &mut row).expect_err(expected).to_string();
        assert_eq!(error, format!("tensor `{UP}.{expected}"));
    }

    fn columns(&self) -> usize {
        self.config["hidden_size"].as_u64().expect("a number") as usize
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn bf16(bytes: &[u8], i: usize) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])) << 16)
}

/// The numbers of the projection, as the source reads them.
fn numbers(fixture: &Fixture, rows: usize) -> Vec<f32> {
    let (_dir, model) = fixture.load(None);
    let model = model.expect("it loads");
    let mut all = vec![0.0; rows * fixture.columns()];
    model.source.expect("there are weights").read_rows(&format!("{UP}.weight"), 0, &mut all).expect("readable");
    all
}

#[test]
fn fp8_is_code_times_scale() {
    let mut f = Fixture::read("fp8");
    let columns = f.columns();
    let codes = f.part("weight").2.clone();
    let scale = bf16(&f.part("weight_scale_inv").2, 0);
    let code = |c: u8| {
        let (e, m) = (i32::from(c >> 3 & 15), f32::from(c & 7));
        let magnitude = if e == 0 { m * 2f32.powi(-9) } else { (8.0 + m) * 2f32.powi(e - 10) };
        if c & 0x80 == 0 { magnitude } else { -magnitude }
    };
    let want: Vec<f32> = codes.iter().map(|&c| code(c) * scale).collect();
    assert_eq!(numbers(&f, codes.len() / columns), want);
}

#[test]
fn packed_integers_count_from_the_low_bits() {
    let mut f = Fixture::read("int4");
    let (columns, packed) = (f.columns(), words(&f.part("weight_packed").2));
    let scales = f.part("weight_scale").2.clone();
    let rows = packed.len() * 8 / columns;
    let want = |row: usize, c: usize| {
        let code = packed[row * columns / 8 + c / 8] >> (c % 8 * 4) & 15;
        (code as f32 - 8.0) * bf16(&scales, row * columns / 32 + c / 32)
    };
    let want: Vec<f32> = (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))).map(|(r, c)| want(r, c)).collect();
    assert_eq!(numbers(&f, rows), want);
}

#[test]
fn gptq_lies_across() {
    let mut f = Fixture::read("gptq-int4");
    let (columns, packed) = (f.columns(), words(&f.part("qweight").2));
    let scales = f.part("scales").2.clone();
    let rows = packed.len() * 8 / columns;
    let half = |i: usize| half::f16::from_le_bytes([scales[2 * i], scales[2 * i + 1]]).to_f32();
    let want = |row: usize, c: usize| {
        let code = packed[c / 8 * rows + row] >> (c % 8 * 4) & 15;
        (code as f32 - 8.0) * half(c / 32 * rows + row)
    };
    let want: Vec<f32> = (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))).map(|(r, c)| want(r, c)).collect();
    assert_eq!(numbers(&f, rows), want);
}

#[test]
fn companions_must_be_there_and_fit() {
    let fixture = || Fixture::read("int4");
    let mut f = fixture();
    f.tensors.remove(&format!("{UP}.weight_scale"));
    f.refuse("weight_packed` belongs to quantised weights: its scales `model.layers.0.mlp.shared_expert.up_proj.weight_scale` are missing");
    let mut f = fixture();
    f.part("weight_scale").0 = "I16".into();
    f.refuse("weight_scale` has dtype I16, expected BF16, F16 or F32");
    let mut f = fixture();
    f.part("weight_scale").1 = vec![32, 6];
    f.refuse("weight_scale` has shape [32, 6], expected [64, 6]");
    let mut f = fixture();
    f.part("weight_shape").2[0] = 63;
    f.refuse("weight_shape` belongs to quantised weights: it holds Some([63, 96]), expected 64 rows and columns for 12 words");
    let mut f = fixture();
    f.part("weight_shape").2[8..16].copy_from_slice(&(-1i64).to_le_bytes());
    f.refuse("weight_shape` belongs to quantised weights: it holds None, expected 64 rows and columns for 12 words");
    let mut f = fixture();
    f.tensors.remove(&format!("{UP}.weight_shape"));
    f.refuse("weight_shape` is missing, expected shape [2]");
    let mut f = fixture();
    let (dtype, shape, _) = f.part("weight_packed");
    (*dtype, shape[1]) = ("U8".into(), 48);
    f.refuse("weight_packed` belongs to quantised weights: it is U8, expected I32 (integers of 4 or 8 bits)");
    let mut f = fixture();
    f.part("weight_scale").1 = vec![96, 2];
    f.refuse("weight_scale` has shape [96, 2], expected [64, 2]");

    let mut f = Fixture::read("fp8");
    f.tensors.remove(&format!("{UP}.weight_scale_inv"));
    f.refuse("weight_scale_inv` is missing, expected shape [1, 1]");
    let mut f = Fixture::read("fp8");
    f.part("weight").0 = "F8_E5M2".into();
    f.refuse("weight_scale_inv` belongs to quantised weights: the codes that it describes are not there, or are of a kind that is not read");

    let mut f = Fixture::read("gptq-int4");
    f.part("scales").1 = vec![1, 64];
    f.refuse("scales` has shape [1, 64], expected [2, 32]");
    let mut f = Fixture::read("gptq-int4");
    f.config["quantization_config"]["desc_act"] = json!(true);
    f.tensors.remove(&format!("{UP}.g_idx"));
    f.refuse(&format!("qweight` belongs to quantised weights: `desc_act` is true, but `{UP}.g_idx` is missing"));
    let mut f = Fixture::read("gptq-int4");
    f.config["quantization_config"] = Value::Null;
    let (_dir, model) = f.load(Quantise::default());
    let error = model.expect_err("nothing says what it is").to_string();
    assert!(
        error.contains("qweight` belongs to quantised weights: `quantization_config` of config.json says neither"),
        "{error}"
    );
}

#[test]
fn contents_are_checked_when_they_are_read() {
    let mut f = Fixture::read("int4");
    f.part("weight_scale").2[2 * 3 + 1] = 0x7f;
    f.part("weight_scale").2[2 * 3] = 0xc0;
    f.refuse_reading("weight_scale`: element 3 is NaN, expected a finite number");
    let mut f = Fixture::read("fp8");
    f.part("weight").2[64 + 5] = 0xff;
    f.refuse_reading("weight`: row 1 holds NaN, expected finite numbers");
    let mut f = Fixture::read("fp8");
    f.part("weight_scale_inv").2.copy_from_slice(&0x7f80u16.to_le_bytes());
    f.refuse_reading("weight_scale_inv`: element 0 is inf, expected a finite number");
    let mut f = Fixture::read("gptq-int4");
    f.part("qzeros").2[0] = 0x57;
    f.refuse_reading("qzeros`: a zero point is 6, expected 8 as `quantization_config` says symmetric");
    let mut f = Fixture::read("gptq-int4");
    f.part("g_idx").2[4 * 7] = 2;
    f.refuse_reading("g_idx`: column 7 is in group 2, expected one of 2 groups");
}

#[test]
fn a_checkpoint_is_quantised_on_request() {
    let f = Fixture::read("int4");
    let (_dir, model) = f.load(Some(Quant::Q8));
    let weights = &model.expect("it loads").module.weights;
    let format = |name: &str| weights[name].format.to_string();
    assert_eq!(format("layers.0.w_q"), "q8<g32>");
    assert_eq!(format("mtp.w_e"), "q8<g32>");
    assert_eq!(format("layers.0.mlp.router"), "bf16");
    assert_eq!(format("final_norm"), "f32");
}

#[test]
fn exceptions_have_their_own_formats() {
    let f = Fixture::read("int4");
    let quantise = |text: &str| text.parse::<Quantise>().expect("it is well formed");
    let (_dir, model) = f.load(quantise("q4,head=q8,layers.0.*=bf16,experts_up=keep"));
    let weights = &model.expect("it loads").module.weights;
    let format = |name: &str| weights[name].format.to_string();
    assert_eq!(format("head"), "q8<g32>");
    assert_eq!(format("layers.0.w_q"), "bf16");
    assert_eq!(format("layers.1.w_q"), "q4<g32>");
    assert_eq!(format("layers.1.mlp.experts_up"), "q4<g32,bf16>");
    assert_eq!(format("final_norm"), "f32");
    let (_dir, model) = f.load(quantise("q4,layers.9.*=q8"));
    let error = model.expect_err("there is no such layer").to_string();
    let expected = "`--quant`: no matrix is called `layers.9.*`, expected a word that `nextc formats` lists, or one of embed, head, layers.*.w_q, ";
    assert!(error.starts_with(expected), "{error}");
    let (_dir, model) = f.load(quantise("final_norm=q8"));
    assert!(model.expect_err("it is a vector").to_string().contains("no matrix is called `final_norm`"));
}

#[test]
fn what_no_block_fits_is_widened_with_a_word() {
    // heads of 16 rows in blocks of 32 rows: two of q and k lie in each
    let mut f = Fixture::read("fp8");
    f.config["linear_num_key_heads"] = json!(4);
    f.config["linear_key_head_dim"] = json!(8);
    let (_dir, model) = f.load(Quantise::default());
    let model = model.expect("it loads");
    assert_eq!(model.module.weights["layers.0.w_q"].format.to_string(), "fp8<128x128>");
    let mut f = Fixture::read("int4");
    f.config["linear_value_head_dim"] = json!(8);
    f.config["linear_num_value_heads"] = json!(8);
    for (name, (_, shape, data)) in &mut f.tensors {
        if name.ends_with("A_log") || name.ends_with("dt_bias") {
            (*shape, *data) = (vec![8], [data.as_slice(), data.as_slice()].concat());
        } else if name.ends_with("linear_attn.norm.weight") {
            (*shape, *data) = (vec![8], data[..16].to_vec());
        } else if name.ends_with("in_proj_ba.weight") {
            (shape[0], *data) = (16, [data.as_slice(), data.as_slice()].concat());
        }
    }
    let (_dir, model) = f.load(Quantise::default());
    let model = model.expect("it loads");
    assert_eq!(model.module.weights["layers.0.w_out"].format.to_string(), "f32");
    assert_eq!(model.module.weights["layers.0.w_v"].format.to_string(), "q4<g32,bf16>");
    assert!(model.warnings.iter().any(|w| w.contains("among them `layers.0.w_out`")), "{:?}", model.warnings);
}
