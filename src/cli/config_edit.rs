//! `--set KEY=VALUE` at `init`: any setting of a role's `config.toml`, checked by the role's own reader, so that there is
//! no second list of settings to keep.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Writes `settings` into `<dir>/config.toml`; `check` reads the file as the role will.
pub(crate) fn apply<C, E>(dir: &Path, settings: &[String], check: impl Fn(&Path) -> Result<C, E>) -> Result<()>
where
    E: std::error::Error + Send + Sync + 'static,
{
    if settings.is_empty() {
        return Ok(());
    }
    let path = dir.join("config.toml");
    let before = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut table: toml::Table = before.parse().with_context(|| format!("{} is no TOML file", path.display()))?;
    for setting in settings {
        let Some((key, value)) = setting.split_once('=') else {
            bail!("--set '{setting}': KEY=VALUE is expected, such as --set copies=2");
        };
        table.insert(key.trim().to_owned(), value_of(value.trim()));
    }
    fs::write(&path, table.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    if let Err(error) = check(dir) {
        fs::write(&path, before).with_context(|| format!("cannot write {}", path.display()))?;
        return Err(error).with_context(|| {
            format!(
                "--set: {} is set up without it; correct {}, or remove the folder and repeat",
                dir.display(),
                path.display()
            )
        });
    }
    Ok(())
}

/// A TOML value where it is one (`3`, `true`, `["a"]`), else text.
fn value_of(text: &str) -> toml::Value {
    let line = format!("value = {text}");
    line.parse::<toml::Table>()
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}
