/**
 * The kernel's netlink family "vdpa": which vDPA devices there are and which management device made each, which needs no
 * privileges and touches no device; and adding and deleting one, which need CAP_NET_ADMIN.
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

/**
 * Has a management device make a vDPA device, as `vdpa dev add` does. Resolves when a driver has taken it.
 *
 * @param managementDevice one without a bus: `vduse`, `vdpasim_blk`
 * @throws SysError EPERM; EEXIST when there is a vDPA device of that name; EINVAL, ENODEV, ENOENT when it cannot make one
 */
export async function addVdpaDevice(managementDevice: string, name: string): Promise<void> {
  const attributes = [[VDPA_ATTR.MGMTDEV_DEV_NAME, managementDevice], [VDPA_ATTR.DEV_NAME, name]] as const;
  await change(VDPA_CMD.DEV_NEW, attributes, `vDPA device ${name} of ${managementDevice}`);
}

/**
 * Deletes a vDPA device, as `vdpa dev del` does. Resolves when it is gone: whoever has its /dev/vhost-vdpa-N open is waited for.
 *
 * @throws SysError EPERM; ENODEV when there is none of that name
 */
export async function deleteVdpaDevice(name: string): Promise<void> {
  await change(VDPA_CMD.DEV_DEL, [[VDPA_ATTR.DEV_NAME, name]], `vDPA device ${name}`);
}

async function change(command: number, attributes: readonly (readonly [number, string])[], what: string): Promise<void> {
  using socket = new NetlinkSocket();
  const type = familyId(socket);
  // The kernel asks the device's driver meanwhile, and that may be this very process.
  await socket.sendOnPool(encodeNetlink({ type, flags: NLM_F.REQUEST | NLM_F.ACK, sequence: 2, command, attributes }));
  for (const message of decodeNetlink(socket.receive())) {
    if (message.errno === 0) continue;
    const hint = message.errno === ERRNO.EPERM ? "Adding and deleting vDPA devices needs CAP_NET_ADMIN" : undefined;
    throw new SysError("netlink vdpa", message.errno, what, hint);
  }
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
