//! `terway-cli metadata`: the metadata service's words.

use std::fmt::Write as _;

use serde_json::json;
use terway_proto::v1;

use super::table::{Style, block, error_line, errors_json, pretty};

pub(super) fn render(reply: &v1::GetMetadataResponse, style: Style) -> String {
    if style.is_json() {
        return pretty(&json!({
            "instance": reply.instance, "instanceType": reply.instance_type, "region": reply.region,
            "zone": reply.zone, "primaryMAC": reply.primary_mac,
            "nics": reply.nics.iter().map(|nic| json!({
                "mac": nic.mac, "eni": nic.eni, "vswitch": nic.vswitch, "primaryAddress": nic.primary_address,
                "addresses": nic.addresses, "cidrV4": nic.cidr_v4, "gatewayV4": nic.gateway_v4,
                "cidrV6": nic.cidr_v6, "gatewayV6": nic.gateway_v6, "primary": nic.mac == reply.primary_mac,
            })).collect::<Vec<_>>(),
            "errors": errors_json(&reply.errors),
        }));
    }
    let mut out = block(&[
        ("instance", reply.instance.clone()),
        ("type", reply.instance_type.clone()),
        ("region", reply.region.clone()),
        ("zone", reply.zone.clone()),
        ("primary MAC", reply.primary_mac.clone()),
    ]);
    for error in &reply.errors {
        let _ = writeln!(out, "problem  {}\n  remedy {}", error_line(error), error.remedy);
    }
    if !reply.nics.is_empty() {
        let head = [
            "ENI",
            "MAC",
            "VSWITCH",
            "PRIMARY-ADDRESS",
            "ADDRESSES",
            "CIDR",
            "GATEWAY",
            "+CIDR6",
            "+GATEWAY6",
            "+LIST",
        ];
        let rows = reply.nics.iter().map(|nic| {
            vec![
                nic.eni.clone(),
                nic.mac.clone(),
                nic.vswitch.clone(),
                nic.primary_address.clone(),
                nic.addresses.len().to_string(),
                nic.cidr_v4.clone(),
                nic.gateway_v4.clone(),
                nic.cidr_v6.clone(),
                nic.gateway_v6.clone(),
                nic.addresses.join(","),
            ]
        });
        out.push('\n');
        out.push_str(&style.table(&head, rows));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::sample;

    #[test]
    fn a_service_that_answers_by_half() {
        insta::assert_snapshot!("metadata", sample::all(|style| super::render(&sample::metadata(), style)));
    }
}
