//! The cryptography below HTTPS: ring, chosen once for the process. rustls' own default would bring a C library that takes minutes to build.

use std::sync::Once;

static CHOSEN: Once = Once::new();

/// Makes sure that HTTPS clients can be built. Whoever chose another provider for the process before keeps it.
pub fn ready() {
    CHOSEN.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_client_that_may_speak_https_can_be_built() {
        super::ready();
        super::ready();
        reqwest::Client::builder().https_only(true).build().unwrap();
    }
}
