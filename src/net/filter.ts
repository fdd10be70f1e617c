/**
 * Which frames a network device receives (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3).
 *
 * @module
 */
import { formatMac } from "./command.ts";
import type { NetState } from "./state.ts";

const BROADCAST = "ff:ff:ff:ff:ff:ff";
const ETHERTYPE_VLAN = 0x8100;

/** What of the negotiated features a filter depends on. */
export interface NetFilterFeatures {
  /** CTRL_RX: without it everything is received. */
  rx: boolean;
  /** CTRL_VLAN: without it every VLAN is received. */
  vlan: boolean;
}

/**
 * Does the device receive a frame? A driver that has not switched PROMISC off gets everything.
 *
 * @param frame from the destination address on, at least 14 bytes
 * @param mac the device's own address, where it is not set by the driver
 */
export function acceptsFrame(state: NetState, frame: Uint8Array, mac: string, features: NetFilterFeatures): boolean {
  if (features.vlan && frame.length >= 18 && (frame[12]! << 8 | frame[13]!) === ETHERTYPE_VLAN) {
    if (!state.hasVlan((frame[14]! << 8 | frame[15]!) & 0xfff)) return false;
  }
  if (!features.rx || state.rxMode("promisc") !== false) return true;
  const target = formatMac(frame);
  if (target === BROADCAST) return state.rxMode("nobcast") !== true;
  if ((frame[0]! & 1) === 1) {
    if (state.rxMode("nomulti") === true) return false;
    return state.rxMode("allmulti") === true || (state.macTable?.multicast.includes(target) ?? false);
  }
  if (state.rxMode("nouni") === true) return false;
  if (state.rxMode("alluni") === true) return true;
  return target === (state.mac ?? mac) || (state.macTable?.unicast.includes(target) ?? false);
}
