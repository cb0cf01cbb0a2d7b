// SPDX-License-Identifier: GPL-2.0-only OR ISC
/*
 * vmmci: the VMM control interface of OpenBSD's vmd and of pyvmd, for Linux guests.
 *
 * The host asks this guest to shut down, to reboot, or to look at the clock. The device is PCI
 * 0b5d:0777, a legacy virtio device without queues; virtio_pci leaves it alone because of its ids.
 *
 *    0  4  device features     18  1  status                   20  4  command
 *    4  4  driver features     19  1  ISR, cleared by reading  24  8  host's time, seconds
 *                                                              32  8  and microseconds
 *
 * A command is acknowledged by writing it back. When this guest powers off or halts by itself, it
 * writes SHUTDOWN, so that the host ends the VM even if there is no way to switch the machine off.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/reboot.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/workqueue.h>

#define VMMCI_VENDOR		0x0b5d
#define VMMCI_DEVICE		0x0777

#define REG_DEVICE_FEATURES	0
#define REG_DRIVER_FEATURES	4
#define REG_STATUS		18
#define REG_ISR			19
#define REG_COMMAND		20
#define REG_SECONDS		24	/* reading it takes the time that the others show */
#define REG_SECONDS_HIGH	28
#define REG_MICROSECONDS	32
#define REG_END			40

#define STATUS_ACKNOWLEDGE	0x01
#define STATUS_DRIVER		0x02
#define STATUS_DRIVER_OK	0x04
#define STATUS_FAILED		0x80

#define ISR_CONFIG		0x02

#define F_TIMESYNC		BIT(0)
#define F_ACK			BIT(1)
#define F_SYNCRTC		BIT(2)

enum vmmci_command {
	VMMCI_NONE,
	VMMCI_SHUTDOWN,
	VMMCI_REBOOT,
	VMMCI_SYNCRTC,
};

static unsigned int tolerated_ms = 500;
module_param(tolerated_ms, uint, 0644);
MODULE_PARM_DESC(tolerated_ms, "difference to the host's clock that is left alone (ms)");

struct vmmci {
	struct pci_dev *pdev;
	void __iomem *regs;
	u32 features;			/* accepted */
	u32 going_down;			/* command that is being obeyed, read once per boot */
	struct work_struct work;
	struct notifier_block reboot;
};

/* Set the clock to the host's, unless they agree. */
static void vmmci_sync_clock(struct vmmci *vmmci)
{
	struct timespec64 host, guest;
	s64 ahead_ns;

	if (!(vmmci->features & F_TIMESYNC))
		return;
	host.tv_sec = ioread32(vmmci->regs + REG_SECONDS);
	host.tv_sec |= (u64)ioread32(vmmci->regs + REG_SECONDS_HIGH) << 32;
	host.tv_nsec = (long)ioread32(vmmci->regs + REG_MICROSECONDS) * NSEC_PER_USEC;
	ktime_get_real_ts64(&guest);
	ahead_ns = timespec64_to_ns(&host) - timespec64_to_ns(&guest);
	if (abs(ahead_ns) <= (u64)tolerated_ms * NSEC_PER_MSEC)
		return;
	if (do_settimeofday64(&host))
		dev_warn(&vmmci->pdev->dev, "cannot set the clock\n");
	else
		dev_info(&vmmci->pdev->dev, "clock set, %lld ms\n",
			 div_s64(ahead_ns, NSEC_PER_MSEC));
}

static void vmmci_acknowledge(struct vmmci *vmmci, u32 command)
{
	if (vmmci->features & F_ACK)
		iowrite32(command, vmmci->regs + REG_COMMAND);
}

/* Do what the host asks for; in process context, since user space has a part in it. */
static void vmmci_work(struct work_struct *work)
{
	struct vmmci *vmmci = container_of(work, struct vmmci, work);
	u32 command = ioread32(vmmci->regs + REG_COMMAND);

	switch (command) {
	case VMMCI_NONE:
		break;
	case VMMCI_SHUTDOWN:
	case VMMCI_REBOOT:
		/* What is under way cannot be turned back; and to ask twice means "at once". */
		if (!vmmci->going_down) {
			vmmci->going_down = command;
			dev_info(&vmmci->pdev->dev, "the host asks for a %s\n",
				 command == VMMCI_SHUTDOWN ? "shutdown" : "reboot");
			if (command == VMMCI_SHUTDOWN)
				orderly_poweroff(true);
			else
				orderly_reboot();
		}
		vmmci_acknowledge(vmmci, command);
		break;
	case VMMCI_SYNCRTC:
		vmmci_sync_clock(vmmci);
		vmmci_acknowledge(vmmci, command);
		break;
	default:
		dev_warn_ratelimited(&vmmci->pdev->dev, "unknown command %u\n", command);
	}
}

static irqreturn_t vmmci_interrupt(int irq, void *data)
{
	struct vmmci *vmmci = data;
	u8 isr = ioread8(vmmci->regs + REG_ISR);	/* lowers the line */

	/* All-ones come from a device that has gone. */
	if (!isr || isr == 0xff)
		return IRQ_NONE;
	if (isr & ISR_CONFIG)
		schedule_work(&vmmci->work);
	return IRQ_HANDLED;
}

/* File systems are unmounted by now: tell the host, which gives us a few seconds. */
static int vmmci_reboot(struct notifier_block *block, unsigned long event, void *unused)
{
	struct vmmci *vmmci = container_of(block, struct vmmci, reboot);

	if (event == SYS_POWER_OFF || event == SYS_HALT)
		iowrite32(VMMCI_SHUTDOWN, vmmci->regs + REG_COMMAND);
	return NOTIFY_DONE;
}

static void vmmci_status(struct vmmci *vmmci, u8 bits)
{
	iowrite8(ioread8(vmmci->regs + REG_STATUS) | bits, vmmci->regs + REG_STATUS);
}

static int vmmci_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct vmmci *vmmci;
	int err;

	vmmci = devm_kzalloc(&pdev->dev, sizeof(*vmmci), GFP_KERNEL);
	if (!vmmci)
		return -ENOMEM;
	vmmci->pdev = pdev;
	INIT_WORK(&vmmci->work, vmmci_work);
	pci_set_drvdata(pdev, vmmci);

	err = pci_enable_device(pdev);
	if (err)
		return err;
	err = pci_request_regions(pdev, KBUILD_MODNAME);
	if (err)
		goto disable;
	if (pci_resource_len(pdev, 0) < REG_END) {
		err = -ENODEV;
		goto release;
	}
	vmmci->regs = pci_iomap(pdev, 0, 0);
	if (!vmmci->regs) {
		err = -ENOMEM;
		goto release;
	}

	iowrite8(0, vmmci->regs + REG_STATUS);
	vmmci_status(vmmci, STATUS_ACKNOWLEDGE);
	vmmci_status(vmmci, STATUS_DRIVER);
	vmmci->features = ioread32(vmmci->regs + REG_DEVICE_FEATURES) &
			  (F_TIMESYNC | F_ACK | F_SYNCRTC);
	iowrite32(vmmci->features, vmmci->regs + REG_DRIVER_FEATURES);

	err = request_irq(pdev->irq, vmmci_interrupt, IRQF_SHARED, KBUILD_MODNAME, vmmci);
	if (err)
		goto fail;
	vmmci->reboot.notifier_call = vmmci_reboot;
	vmmci->reboot.priority = INT_MIN;	/* after everybody else's last words */
	err = register_reboot_notifier(&vmmci->reboot);
	if (err)
		goto free;
	vmmci_status(vmmci, STATUS_DRIVER_OK);
	/* A command may be older than this driver. */
	schedule_work(&vmmci->work);
	dev_info(&pdev->dev, "features %#x\n", vmmci->features);
	return 0;

free:
	free_irq(pdev->irq, vmmci);
fail:
	vmmci_status(vmmci, STATUS_FAILED);
	pci_iounmap(pdev, vmmci->regs);
release:
	pci_release_regions(pdev);
disable:
	pci_disable_device(pdev);
	return err;
}

static void vmmci_remove(struct pci_dev *pdev)
{
	struct vmmci *vmmci = pci_get_drvdata(pdev);

	unregister_reboot_notifier(&vmmci->reboot);
	iowrite8(0, vmmci->regs + REG_STATUS);
	free_irq(pdev->irq, vmmci);
	cancel_work_sync(&vmmci->work);
	pci_iounmap(pdev, vmmci->regs);
	pci_release_regions(pdev);
	pci_disable_device(pdev);
}

static const struct pci_device_id vmmci_ids[] = {
	{ PCI_DEVICE(VMMCI_VENDOR, VMMCI_DEVICE) },
	{ }
};
MODULE_DEVICE_TABLE(pci, vmmci_ids);

static struct pci_driver vmmci_driver = {
	.name = KBUILD_MODNAME,
	.id_table = vmmci_ids,
	.probe = vmmci_probe,
	.remove = vmmci_remove,
};
module_pci_driver(vmmci_driver);

MODULE_DESCRIPTION("VMM control interface of OpenBSD's vmd and of pyvmd");
MODULE_AUTHOR("pyvmd");
MODULE_VERSION("1.0");
MODULE_LICENSE("Dual BSD/GPL");
