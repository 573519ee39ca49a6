//! What `terway-cli` asks for beyond the status: the way of each pod compared layer by layer, and the metadata service's words.

use std::collections::BTreeMap;

use terway_core::errors::{self, Error};
use terway_core::ipam::Phase;
use terway_core::reconcile::{Finding, Layer, StoredAttachment, findings};
use terway_proto::v1;

use super::Engine;
use super::audit::Observation;
use crate::grpc::{attachment, error_detail, pod};

impl Engine {
    /// Compares store, kernel, datapath and, unless it shall be left out, the cloud.
    pub async fn mapping(&self, ask_cloud: bool) -> v1::GetMappingResponse {
        let Observation { snapshot, kernel, datapath, cloud } = self.look(ask_cloud).await;
        let found = findings(&snapshot);
        let source = |name: &str, answer: &Result<(), Error>| v1::Source {
            name: name.to_owned(),
            error: answer.as_ref().err().map(error_detail),
        };
        let mut sources = vec![source("store", &Ok(())), source("kernel", &kernel), source("datapath", &datapath)];
        sources.extend(cloud.as_ref().map(|answer| source("cloud", answer)));
        let heard = |layer: Layer| match layer {
            Layer::Datapath => datapath.is_ok() && kernel.is_ok(),
            Layer::Cloud => snapshot.cloud.is_some(),
            Layer::Pod | Layer::Link | Layer::Route | Layer::Rule | Layer::Eni => kernel.is_ok(),
        };
        let nics: BTreeMap<_, _> = self.links.nics().into_iter().map(|nic| (nic.ifindex, nic.name)).collect();
        let mut stored: Vec<&StoredAttachment> = snapshot.attachments.iter().collect();
        stored.sort_by(|a, b| a.plan.inputs.key.cmp(&b.plan.inputs.key));
        let pods = stored.iter().map(|stored| {
            let inputs = &stored.plan.inputs;
            let verdict = |layer: Layer| {
                let mine = |f: &&Finding| f.key.as_ref() == Some(&inputs.key) && f.kind.is_mismatch();
                // A pod that is gone shows where its interface should be.
                let shows = |of: Layer| if of == Layer::Pod { Layer::Link } else { of };
                let wrong = found.iter().filter(mine).any(|f| shows(f.kind.layer()) == layer);
                // Without the link the other layers of the node cannot be there, and were not looked at.
                let cut = found.iter().filter(mine).any(|f| matches!(f.kind.layer(), Layer::Pod | Layer::Link))
                    && matches!(layer, Layer::Route | Layer::Datapath);
                match (stored.phase, wrong, heard(layer)) {
                    (Phase::SettingUp | Phase::Releasing, ..) => "changing",
                    (Phase::Ready, true, _) => "wrong",
                    (Phase::Ready, false, false) => "unknown",
                    (Phase::Ready, false, true) if cut => "unknown",
                    (Phase::Ready, false, true) => "ok",
                }
                .to_owned()
            };
            v1::MappingRow {
                attachment: Some(attachment(&inputs.key)),
                pod: Some(pod(&stored.pod)),
                phase: stored.phase.as_str().to_owned(),
                addresses: inputs.addresses.iter().map(|address| address.to_string()).collect(),
                eni: stored.eni.to_string(),
                eni_ifname: nics.get(&inputs.eni_ifindex).cloned().unwrap_or_default(),
                host_ifname: inputs.host_ifname.clone(),
                link: verdict(Layer::Link),
                route: verdict(Layer::Route),
                rule: verdict(Layer::Rule),
                datapath: verdict(Layer::Datapath),
                cloud: verdict(Layer::Cloud),
            }
        });
        let pods = pods.collect();
        let findings = found.iter().map(|finding| {
            let whose = stored.iter().find(|stored| Some(&stored.plan.inputs.key) == finding.key.as_ref());
            v1::Finding {
                kind: finding.kind.name().to_owned(),
                attachment: finding.key.as_ref().map(attachment),
                pod: whose.map(|stored| pod(&stored.pod)),
                subject: finding.subject.clone(),
                evidence: finding.evidence.clone(),
                action: finding.action.name().to_owned(),
                mismatch: finding.kind.is_mismatch(),
            }
        });
        v1::GetMappingResponse { pods, findings: findings.collect(), sources }
    }

    /// Asks the metadata service, now and not from memory.
    pub async fn metadata(&self) -> v1::GetMetadataResponse {
        let mut reply = v1::GetMetadataResponse::default();
        let failed =
            |error: &dyn std::error::Error| error_detail(&Error::new(errors::METADATA_UNREACHABLE, error.to_string()));
        let (identity, nics) = tokio::join!(self.cloud.node_identity(), self.cloud.nics());
        match identity {
            Ok(identity) => {
                reply.instance = identity.instance.to_string();
                reply.instance_type = identity.instance_type;
                reply.region = identity.region;
                reply.zone = identity.zone;
                reply.primary_mac = identity.primary_mac.to_string();
            }
            Err(error) => reply.errors.push(failed(&error)),
        }
        match nics {
            Ok(nics) => {
                for nic in nics {
                    let mut row = v1::MetadataNic {
                        mac: nic.mac.to_string(),
                        eni: nic.id.to_string(),
                        vswitch: nic.vswitch.to_string(),
                        primary_address: nic.primary_v4.to_string(),
                        addresses: nic.v4.iter().map(ToString::to_string).collect(),
                        ..Default::default()
                    };
                    row.addresses.extend(nic.v6.iter().map(ToString::to_string));
                    match self.cloud.subnet(nic.mac).await {
                        Ok(subnet) => {
                            row.cidr_v4 = subnet.cidr_v4.to_string();
                            row.gateway_v4 = subnet.gateway_v4.to_string();
                            row.cidr_v6 = subnet.cidr_v6.map(|cidr| cidr.to_string()).unwrap_or_default();
                            row.gateway_v6 = subnet.gateway_v6.map(|gateway| gateway.to_string()).unwrap_or_default();
                        }
                        Err(error) => reply.errors.push(failed(&error)),
                    }
                    reply.nics.push(row);
                }
            }
            Err(error) => reply.errors.push(failed(&error)),
        }
        reply.nics.sort_by_key(|nic| (nic.mac != reply.primary_mac, nic.eni.clone()));
        reply
    }
}
