package nb.calib.tagger

import java.io.File
import java.nio.ByteBuffer
import java.security.MessageDigest
import javax.imageio.ImageIO
import kotlin.test.Test
import kotlin.test.assertEquals

/** A whole benchmark in the JVM, from PNG files to the result.json that Python then lays beside its own run. */
class JvmRun {
    private class Png(private val file: File) : Photo {
        override val name: String = file.name
        override fun load(): Pixels {
            val image = ImageIO.read(file)
            return Pixels(image.width, image.height, image.getRGB(0, 0, image.width, image.height, null, 0, image.width))
        }
    }

    @Test
    fun writesAResult() {
        val file = File(System.getProperty("programs"), "int8.pte")
        val bytes = file.readBytes()
        val program = Program.read(ByteBuffer.wrap(bytes))
        val spec = program.spec()
        val photos = File(System.getProperty("photos")).listFiles()!!.sortedBy { it.name }.map { Png(it) }
        ModuleNet.open(file.path, program).use { net ->
            val report = Engine(net, spec).benchmark(photos, Plan(warmup = 1, runs = 2))
            assertEquals(photos.size, report.photos.size)
            val hash = MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }
            val about = linkedMapOf(
                "program" to linkedMapOf("file" to file.name, "sha256" to hash), "backends" to net.backends,
                "device" to DeviceInfo("a PC", "JVM", "none", "", "", "x86_64", 2, 0).toMap(),
            )
            File(System.getProperty("result")).writeText(Json.write(report.toMap(about)))
        }
    }
}
