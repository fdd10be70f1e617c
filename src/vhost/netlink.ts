/**
 * The kernel's netlink family "vdpa", read only: which vDPA devices there are and which management device made each. Needs no
 * privileges and touches no device.
 *
 * @module
 */
import { SvqError } from "../errors.ts";
import { ERRNO, NetlinkSocket, SysError } from "../ffi/mod.ts";
import {
  attributeNumber,
  attributeText,
  CTRL,
  decodeNetlink,
  encodeNetlink,
  type NetlinkMessage,
  NLM_F,
  NLMSG,
  VDPA_ATTR,
  VDPA_CMD,
} from "../uapi/netlink.ts";

/** A socket as {@linkcode NetlinkSocket} is one; tests give recorded answers. */
export interface NetlinkChannel {
  /** Sends one message. */
  send(message: Uint8Array<ArrayBuffer>): void;
  /** The next datagram. */
  receive(): Uint8Array<ArrayBuffer>;
}

/** A vDPA device as the family describes it. */
export interface NetlinkVdpa {
  /** Name on the vdpa bus. */
  name: string;
  /** Management device: `vdpasim_blk`, `vduse`, `pci/0000:00:05.0`. */
  managementDevice: string | undefined;
  /** Virtio device id. */
  deviceId: number | undefined;
  /** Vendor id. */
  vendorId: number | undefined;
  /** Most queues. */
  maxVqs: number | undefined;
  /** Largest ring, descriptors. */
  maxVqSize: number | undefined;
}

/** The family's devices. @throws SysError ENOENT where the kernel has no such family (module vdpa not loaded) */
export function listVdpaDevices(channel?: NetlinkChannel): NetlinkVdpa[] {
  if (channel !== undefined) return ask(channel);
  using socket = new NetlinkSocket();
  return ask(socket);
}

function ask(channel: NetlinkChannel): NetlinkVdpa[] {
  const family = familyId(channel);
  const answers = exchange(channel, { type: family, flags: NLM_F.REQUEST | NLM_F.DUMP, sequence: 2, command: VDPA_CMD.DEV_GET });
  return answers.map(({ attributes }) => {
    const bus = attributeText(attributes.get(VDPA_ATTR.MGMTDEV_BUS_NAME));
    const device = attributeText(attributes.get(VDPA_ATTR.MGMTDEV_DEV_NAME));
    return {
      name: attributeText(attributes.get(VDPA_ATTR.DEV_NAME)) ?? "?",
      managementDevice: bus === undefined ? device : `${bus}/${device}`,
      deviceId: attributeNumber(attributes.get(VDPA_ATTR.DEV_ID)),
      vendorId: attributeNumber(attributes.get(VDPA_ATTR.DEV_VENDOR_ID)),
      maxVqs: attributeNumber(attributes.get(VDPA_ATTR.DEV_MAX_VQS)),
      maxVqSize: attributeNumber(attributes.get(VDPA_ATTR.DEV_MAX_VQ_SIZE)),
    };
  });
}

function familyId(channel: NetlinkChannel): number {
  const [answer] = exchange(channel, {
    type: NLMSG.CONTROLLER,
    flags: NLM_F.REQUEST,
    sequence: 1,
    command: CTRL.CMD_GETFAMILY,
    attributes: [[CTRL.ATTR_FAMILY_NAME, "vdpa"]],
  });
  const id = attributeNumber(answer?.attributes.get(CTRL.ATTR_FAMILY_ID));
  if (id === undefined) throw new SvqError("NETLINK", "The kernel named no id for the netlink family vdpa");
  return id;
}

function exchange(channel: NetlinkChannel, request: Parameters<typeof encodeNetlink>[0]): NetlinkMessage[] {
  channel.send(encodeNetlink(request));
  const answers: NetlinkMessage[] = [];
  for (;;) {
    for (const message of decodeNetlink(channel.receive())) {
      if (message.errno !== 0) {
        const hint = message.errno === ERRNO.ENOENT ? "Load the module: modprobe vdpa" : undefined;
        throw new SysError("netlink vdpa", message.errno, "vDPA devices over netlink", hint);
      }
      if (message.type === NLMSG.DONE || message.type === NLMSG.ERROR) return answers;
      answers.push(message);
      if ((message.flags & NLM_F.MULTI) === 0) return answers;
    }
  }
}
